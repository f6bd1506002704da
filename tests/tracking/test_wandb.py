"""Promises about the other tracker: the same tree of runs, offline, in the output folder, and no process left."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError
from waferlab.tracking.runs import Run
from waferlab.tracking.wandb_runs import WandbTree

ROOT = Path(__file__).resolve().parents[2]


def test_without_weights_and_biases_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("waferlab.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        ExperimentConfig(tracker="wandb")
    assert ExperimentConfig(tracker="wandb", enable_mlflow=False).tracker == "wandb"
    with pytest.raises(ConfigError, match="Allowed: mlflow, wandb"):
        ExperimentConfig(tracker="paper")


def records(file):
    """The records of a run's file: 32 KiB blocks of pieces, each with checksum, length, kind (1 whole, 4 last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, joined = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        joined += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(joined)
            joined = b""


def runs_of(folder):
    """{name: what was written} of all offline runs."""
    import json

    runs = {}
    for file in (folder / "wandb").glob("offline-run-*/*.wandb"):
        run = {
            "config": {},
            "summary": {},
            "history": [],
            "tags": [],
            "files": sorted((file.parent / "files").rglob("*")),
        }
        for record in records(file):
            match record.WhichOneof("record_type"):
                case "run":
                    run |= {
                        "name": record.run.display_name,
                        "group": record.run.run_group,
                        "job_type": record.run.job_type,
                    }
                    run["tags"] = list(record.run.tags) or run["tags"]
                    run["notes"] = record.run.notes
                    run["config"] |= {c.key: json.loads(c.value_json) for c in record.run.config.update}
                case "config":
                    run["config"] |= {c.key: json.loads(c.value_json) for c in record.config.update if c.key}
                case "summary":
                    run["summary"] |= {
                        i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.summary.update
                    }
                case "history":
                    items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                    run["history"].append(items)
                case "exit":
                    run["exit_code"] = record.exit.exit_code
        runs[run["name"]] = run
    return runs


@pytest.fixture(scope="module")
def tracked(tiny_arrays, tmp_path_factory):
    pytest.importorskip("wandb")
    import numpy as np
    import optuna

    class PruneTheSecond(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    folder = tmp_path_factory.mktemp("wandb")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    config = ExperimentConfig(
        experiment_name="tiny", model_type="lightning_cnn", use_pretrained=False, max_epochs=2, search_epochs=2,
        num_optuna_trials=2, batch_size=16, image_size=16, data=str(folder / "tiny.npz"), output_dir=str(folder),
        precision="32-true", quiet=True, tracker="wandb",
    )  # fmt: skip
    pipeline = IntegratedMLPipeline(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("waferlab.search.model_search.make_pruner", lambda *_, **__: PruneTheSecond())
        summary = pipeline.run_complete_pipeline()
    return folder, summary, runs_of(folder)


def test_groups_and_job_types_show_the_tree(tracked):
    _, _, runs = tracked
    assert {name: run["job_type"] for name, run in runs.items()} == {
        "tiny": "pipeline", "lightning_cnn_optimized": "model", "trial 0": "trial", "trial 1": "trial",
    }  # fmt: skip
    assert len({run["group"] for run in runs.values()}) == 1
    assert runs["trial 1"]["config"]["parent"] == "lightning_cnn_optimized"


def test_every_run_ends_as_what_became_of_it(tracked):
    _, _, runs = tracked
    assert {name: (run["summary"]["status"], run["exit_code"]) for name, run in runs.items()} == {
        "tiny": ("FINISHED", 0),
        "lightning_cnn_optimized": ("FINISHED", 0),
        "trial 0": ("FINISHED", 0),
        "trial 1": ("KILLED", 130),
    }
    assert runs["trial 1"]["summary"]["reason"].startswith("pruned")
    assert runs["trial 1"]["tags"] == ["KILLED"]


def test_runs_hold_what_the_summary_says(tracked):
    _, summary, runs = tracked
    (model,) = summary["models"]
    written = [point["val_macro_f1"] for point in runs["lightning_cnn_optimized"]["history"] if "val_macro_f1" in point]
    assert written == pytest.approx(model["history"]["val_macro_f1"])
    assert runs["lightning_cnn_optimized"]["config"]["weights"] == model["weights"]
    assert runs["tiny"]["config"]["dataset"]["digest"] == summary["split"]["fingerprint"]
    assert "| lightning_cnn |" in runs["tiny"]["notes"]
    assert "confusion_matrix.png" in {file.name for file in runs["tiny"]["files"]}
    assert summary["registered"] is None
    assert "no registry" in summary["not_registered_because"] and summary["model_file"] == "model.onnx"


def test_nothing_is_left_running_and_mlflow_leaves_no_trace(tracked):
    folder, _, _ = tracked
    assert not [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]
    assert {file.name for file in folder.iterdir()} == {"tiny.npz", "results", "checkpoints", "wandb"}


@pytest.mark.long
def test_a_program_that_ends_without_closing_the_tree_leaves_no_run_and_no_process(tmp_path):
    pytest.importorskip("wandb")
    code = """
import sys
from pathlib import Path
import psutil
from waferlab.tracking.runs import Run
from waferlab.tracking.wandb_runs import WandbTree
writes = WandbTree("tiny", uri=None, folder=Path(sys.argv[1]), warn=print)
writes.run_id(writes.start("a run"))
print(*(process.pid for process in psutil.Process().children(recursive=True)))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    family = [int(number) for number in done.stdout.split()]
    assert family and not any(map(psutil.pid_exists, family)) and done.stderr == "", done
    run = runs_of(tmp_path)["a run"]
    assert (run["summary"]["status"], run["summary"]["reason"]) == ("KILLED", "it was not closed")


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "wandb").write_text("a file where the folder should be")
    warnings = []
    writes = WandbTree("tiny", uri=None, folder=tmp_path, warn=warnings.append)
    writes.start("a run")
    writes.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: goes on without Weights & Biases")


def sittings(folder, *trees):
    """Opens and closes the same run in one tree after the other; its ids."""
    found = []
    for name, resume in trees:
        writes = WandbTree(name, uri=None, folder=folder, warn=pytest.fail, resume=resume)
        found.append(writes.run_id(writes.start("the pipeline", key="the same settings")))
        writes.close()
        time.sleep(1.1)  # folders are named by second and id
    return found


def test_a_run_that_is_resumed_goes_on_under_the_same_id_and_one_that_is_not_has_its_own(tmp_path):
    pytest.importorskip("wandb")
    first, again, resumed, other = sittings(tmp_path, ("a", False), ("a", False), ("a", True), ("b", True))
    assert resumed == again and len({first, again, other}) == 3
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*-{again}/*.wandb"))
    assert len(parts) == 2, "one folder a sitting; `wandb sync` joins what has one id"
    groups = {record.run.run_group for part in parts for record in records(part) if record.HasField("run")}
    assert len(groups) == 1


def test_trials_of_a_search_that_another_machine_leads_have_a_group_that_names_it(tmp_path):
    pytest.importorskip("wandb")
    writes = WandbTree("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    writes.run_id(writes.start("trial 7", parent=Run("the model", id="abcd1234")))
    writes.close()
    trial = runs_of(tmp_path)["trial 7"]
    assert (trial["group"], trial["job_type"]) == ("joined abcd1234", "trial")

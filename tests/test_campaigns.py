"""Promises about the campaigns that break programs: what is wrong with a folder is seen, what is counted is told."""

import json
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from waferlab.records import write_summary
from waferlab.training.checkpoints import CheckpointFiles

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/faults")]

import fault_tables  # noqa: E402
from whole import outcome, problems  # noqa: E402


@pytest.fixture
def folder(tmp_path, made_database):
    """What a run leaves, in small: two checkpoints, weights of pre-training, a summary, a comparison, the tracker's."""
    CheckpointFiles().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, tmp_path / "checkpoints/a/best.ckpt")
    save_file({"w": torch.ones(3)}, tmp_path / "checkpoints/made.safetensors")
    model = {
        "model_type": "a",
        "test": {"macro_f1": 0.5},
        "search": {"best": {"parameters": {"b": 1}, "values": [0.4]}},
    }
    write_summary(tmp_path / "results/experiment_summary.json", {"models": [model]})
    run = {"variant": "a", "seed": 0, "macro_f1": 0.5}
    write_summary(tmp_path / "results/comparison.json", {"mode": "comparison", "runs": [run]})
    (tmp_path / "mlflow.db").write_bytes(made_database)
    return tmp_path


@pytest.fixture(scope="module")
def made_database(tmp_path_factory):
    """A tracker's database with a run for a model below that of the pipeline, and a champion."""
    from mlflow import MlflowClient

    from waferlab.tracking.runs import make_database

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_database(file, files=file.parent.as_uri())
    client = MlflowClient(f"sqlite:///{file}")
    parent = client.create_run("0", run_name="pipeline").info.run_id
    child = client.create_run("0", run_name="model", tags={"mlflow.parentRunId": parent}).info.run_id
    for run in (child, parent):
        client.set_terminated(run)
    client.create_registered_model("wafer")
    client.create_model_version("wafer", file.parent.as_uri())
    client.set_registered_model_alias("wafer", "champion", "1")
    return file.read_bytes()


def test_a_folder_of_which_all_is_whole_has_no_problem_and_an_outcome(folder):
    assert problems(folder) == []
    found = outcome(folder)
    assert found.keys() == {
        "checkpoints/a/best.ckpt", "checkpoints/made.safetensors", "results/experiment_summary.json a",
        "results/comparison.json a 0",
    }  # fmt: skip
    assert found["results/experiment_summary.json a"] == [0.5, {"b": 1}, [0.4]]
    CheckpointFiles().save_checkpoint({"state_dict": {"w": torch.zeros(3)}}, folder / "checkpoints/a/best.ckpt")
    assert outcome(folder)["checkpoints/a/best.ckpt"] != found["checkpoints/a/best.ckpt"]


def test_a_folder_without_an_outcome_is_like_no_other(tmp_path):
    with pytest.raises(ValueError, match="neither weights nor scores"):
        outcome(tmp_path)


DAMAGES = {
    "checkpoints/a/best.ckpt": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "checkpoints/made.safetensors": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "results/comparison.json": lambda file: file.write_text('{"half'),
    "results/report.html": lambda file: file.write_text("<html>"),
    "results/picture.png": lambda file: file.write_bytes(b"\x89PNG"),
    "results/.summary.json.7.tmp": lambda file: file.write_text("{}"),
    "checkpoints/resume.ckpt.unfinished": lambda file: file.write_text(""),
    "checkpoints/made.partial.ckpt": lambda file: shutil.copy(file.with_name("a") / "best.ckpt", file),
    "results/optuna_journal.log": lambda file: file.write_text('{"op_code": 0}\n{"op_co'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_is_not_whole_is_named(name, folder):
    DAMAGES[name](folder / name)
    (found,) = problems(folder)
    assert found.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("update runs set status = 'RUNNING' where name = 'model'", "run model is RUNNING"),
        ("update tags set value = 'gone' where key = 'mlflow.parentRunId'", "run model hangs below none"),
        ("update runs set name = 'pipeline'; delete from tags", "run pipeline is there 2 times"),
        (
            "update runs set name = 'model', status = 'KILLED'; delete from tags; "
            "insert into tags (key, value, run_uuid) select 'key', 'one', run_uuid from runs",
            "run model is there 2 times",
        ),
        ("delete from registered_model_aliases", "wafer has the versions [1], champion []"),
    ],
)
def test_a_tracker_that_lost_or_doubled_something_is_noticed(change, said, folder):
    with sqlite3.connect(folder / "mlflow.db") as store:
        store.executescript(change)
    assert said in problems(folder)


def test_lives_are_counted_by_program_way_and_want():
    life = {"program": "demo", "problems": [], "kills": 1, "group": True, "epochs_again": 1}
    lives = [life, life | {"kills": 2, "group": False, "problems": ["one"]}, life | {"program": "service"}]
    lives[-1]["epochs_again"] = None
    assert fault_tables.kills({"lives": lives})[2:] == [
        "| demo | 3 | 2 | 1 | 1 | 1.0 | 1 |",
        "| service | 1 | 1 | 0 | 1 | - | 0 |",
    ]
    places = [{"program": "demo", "place": place, "problems": []} for place in ("a", "a", "b")]
    assert fault_tables.writes({"lives": places})[2:] == ["| demo | 3 | 2 | 0 |"]
    ended = [{"program": name, "way": "interrupt", "at": at, "seconds": at, "problems": []} for name, at in
             (("demo", 1.5), ("pretrain", 2.25), ("demo", None))]  # fmt: skip
    assert fault_tables.stops({"lives": ended})[2:] == ["| interrupt | 2 | 2 | 2.2 | 0 |"]
    short = [{"program": "demo", "kind": "disk", "status": status, "problems": []} for status in (0, 1, 2)]
    assert fault_tables.scarce({"lives": short})[2:] == ["| disk | 3 | 1 | 2 | 0 |"]
    thrown = [{"reader": "npz", "inputs": 1000, "found": 1}, {"reader": "npz", "inputs": 500, "found": 0}]
    assert fault_tables.fuzz({"rows": thrown})[2:] == ["| npz | 1,500 | 1 |", "", "1,500 inputs in all."]
    grown = json.loads(json.dumps({
        "service": [{"requests": 10, "median_ms": 5.0, "memory_mib": 90, "files": 9}] * 2,
        "search": [{"trials": n, "seconds_a_trial": 0.5, "memory_mib": 400, "files": 20} for n in (100, 900)],
        "registry": [{"versions": n, "seconds": 0.1, "memory_mib": 200, "files": 7} for n in (10, 10_000)],
    }))  # fmt: skip
    assert fault_tables.soak(grown)[2:] == [
        "| service | 20 requests | 90 to 90 | 9 to 9 | 5.0 to 5.0 median ms |",
        "| search | 900 trials | 400 to 400 | 20 to 20 | 0.5 to 0.5 seconds a trial |",
        "| registry | 10,000 versions | 200 to 200 | 7 to 7 | 0.1 to 0.1 seconds |",
    ]

"""Promises about a whole run: outputs, honesty, resume after a kill, clear errors."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import warm
from conftest import tiny_settings
from PIL import Image
from rich.console import Console

import quick_start
from integrated_pipeline import IntegratedMLPipeline
from waferlab import command_line, errors
from waferlab.config import ExperimentConfig
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import SPLITS
from waferlab.errors import ConfigError, DataError, RunError, TrainingDivergedError
from waferlab.records import TrainingRecord
from waferlab.reports.model_card import write_model_card
from waferlab.training.checkpoints import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent


settings = partial(tiny_settings, image_size=24, enable_optuna=False, enable_mlflow=False)


@pytest.fixture(scope="module")
def finished(tiny_arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    config = ExperimentConfig(
        **settings(folder / "tiny.npz", folder, model_type=["lightning_cnn", "torchvision_resnet"])
    )
    pipeline = IntegratedMLPipeline(config)
    return pipeline, pipeline.run_complete_pipeline()


def test_a_run_leaves_the_summary_the_five_pictures_and_the_checkpoints(finished):
    pipeline, summary = finished
    results = pipeline.config.results_dir
    pictures = ("confusion_matrix", "risk_coverage", "sample_predictions", "model_comparison", "training_history")
    for name in pictures:
        with Image.open(results / f"{name}.png") as picture:
            assert min(picture.size) > 300
    written = json.loads((results / "experiment_summary.json").read_text())
    assert written["best_model"] == summary["best_model"]
    assert written["schema_version"] == 1
    for model_type in ("lightning_cnn", "torchvision_resnet"):
        assert (pipeline.config.checkpoints_dir / model_type / "best.ckpt").exists()
        assert (pipeline.config.checkpoints_dir / model_type / "resume.ckpt").exists()
        assert (results / f"per_class_{model_type}.csv").exists()


def run_the_code_of(card):
    usage, names = card.read_text().partition("## How to use it")[2].partition("## ")[0], {}
    exec("\n".join(line[4:] for line in usage.splitlines() if line.startswith("    ")), names)
    return names


def test_the_cards_code_answers_with_the_file_that_was_not_registered_or_loads_the_weights(
    finished, monkeypatch, tmp_path
):
    pipeline, summary = finished
    monkeypatch.chdir(pipeline.config.output_dir)
    assert summary["registered"] is None and summary["model_file"] == "model.onnx"
    assert run_the_code_of(pipeline.config.results_dir / "MODEL_CARD.md")["answers"].classes[0] in CLASS_NAMES
    card, _ = write_model_card(summary | {"model_file": None}, folder=tmp_path)
    best = next(m for m in summary["models"] if m["model_type"] == summary["best_model"])
    assert sum(p.numel() for p in run_the_code_of(card)["model"].network.parameters()) == best["n_parameters"]


def test_a_run_leaves_a_report_and_a_card_of_its_best_model(finished):
    pipeline, summary = finished
    page = (pipeline.config.results_dir / "report.html").read_text().replace("<wbr>", "")
    card = (pipeline.config.results_dir / "MODEL_CARD.md").read_text()
    best = next(m for m in summary["models"] if m["model_type"] == summary["best_model"])
    for text in (page, card):
        assert f"{best['test']['macro_f1']:.3f}" in text and summary["best_model"] in text
    assert summary["verdict"] in page and summary["split"]["fingerprint"] in page
    assert all("Split: lots at random, 70 / 15 / 15% of the maps" in text for text in (page, card))
    sets = best["sets"]
    assert all(f"{sets['alone']:.1%} of the test maps are answered alone" in text for text in (page, card))


def test_a_run_in_order_is_tested_on_the_last_lots_and_is_another_run(tiny_npz, tmp_path):
    made = {
        how: IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, split=how, max_epochs=1)))
        for how in SPLITS
    }
    made["lots"].prepare_data()
    ordered = made["ordered"]
    summary = ordered.run_complete_pipeline()
    lots = {part: ordered.maps.groups[i] for part, i in ordered.split.parts().items()}
    assert lots["test"].min() > max(lots["train"].max(), lots["validation"].max())
    assert summary["models"][0]["test"]["n_samples"] == len(lots["test"])
    assert ordered._fingerprint() != made["lots"]._fingerprint()
    card = (ordered.config.results_dir / "MODEL_CARD.md").read_text()
    assert f"Split: {SPLITS['ordered']}" in card and ordered.split.notes[0] in card


def test_the_reported_figures_come_from_the_checkpoint_on_the_untouched_test_maps(finished):
    from sklearn.metrics import f1_score

    from waferlab.data.images import resize_maps
    from waferlab.evaluation.inference import predict_probabilities

    pipeline, summary = finished
    record = summary["models"][0]
    test = pipeline.split.test
    images = resize_maps(pipeline.maps.select(test), 24)
    model = pipeline.load_model(TrainingRecord.from_json(record))
    said = predict_probabilities(model, images).argmax(1)
    expected = f1_score(pipeline.maps.labels[test], said, labels=range(9), average="macro", zero_division=0)
    assert record["test"]["macro_f1"] == pytest.approx(expected)
    assert summary["split"]["class_counts"]["test"] == dict(
        zip(CLASS_NAMES, np.bincount(pipeline.maps.labels[test], minlength=9).tolist(), strict=True)
    )


def test_the_summary_says_what_the_models_really_started_from(finished):
    _, summary = finished
    assert [m["weights"] for m in summary["models"]] == ["random (not asked for)"] * 2


def test_the_same_seed_gives_the_same_figures_and_another_other_ones(tiny_npz, tmp_path):
    losses = []
    for run, seed in enumerate((0, 0, 1)):
        config = ExperimentConfig(**settings(tiny_npz, tmp_path / str(run), seed=seed, max_epochs=1))
        losses.append(IntegratedMLPipeline(config).train_final_model("lightning_cnn").history["train_loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.long
def test_a_whole_run_gives_the_same_trials_weights_and_scores_again(tiny_npz, tmp_path):
    outcomes = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        config = ExperimentConfig(**settings(tiny_npz, folder, enable_optuna=True))
        (model,) = IntegratedMLPipeline(config).run_complete_pipeline()["models"]
        weights = read_checkpoint(folder / "checkpoints/tiny/lightning_cnn/best.ckpt")["state_dict"]
        trials = [(trial["parameters"], trial["values"]) for trial in model["search"]["trials"]]
        outcomes.append((trials, model["history"]["train_loss"], model["test"], weights))
    (*first, weights), (*second, others) = outcomes
    assert first == second and len(first[0]) == 3
    assert all(torch.equal(weights[name], others[name]) for name in weights)


CHILD = """
import json, sys
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()
"""


def start_child(config):
    return warm.Popen(
        [sys.executable, "-c", CHILD, json.dumps(config)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_for(path, child, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_weights_as_an_unbroken_one(tiny_npz, tmp_path):
    more = {"max_epochs": 12}
    unbroken = ExperimentConfig(**settings(tiny_npz, tmp_path / "unbroken", **more))
    expected = IntegratedMLPipeline(unbroken).train_final_model("lightning_cnn")

    broken = settings(tiny_npz, tmp_path / "broken", **more)
    folder = tmp_path / "broken" / "checkpoints" / "tiny" / "lightning_cnn"
    child = start_child(broken)
    wait_for(folder / "resume.ckpt", child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "finished.json").exists(), "the run ended before it could be killed"
    resumed = IntegratedMLPipeline(ExperimentConfig(**broken | {"resume": True})).train_final_model("lightning_cnn")

    assert resumed.history == expected.history
    end = [
        torch.load(tmp_path / run / "checkpoints/tiny/lightning_cnn/resume.ckpt", weights_only=True)["state_dict"]
        for run in ("unbroken", "broken")
    ]
    assert all(torch.equal(end[0][name], end[1][name]) for name in end[0])


def when_written(pipeline):
    return [file.stat().st_mtime_ns for file in sorted(pipeline.config.checkpoints_dir.glob("*/best.ckpt"))]


def test_resume_takes_finished_models_as_they_are(finished):
    pipeline, first = finished
    before = when_written(pipeline)
    again = IntegratedMLPipeline(replace(pipeline.config, resume=True)).run_complete_pipeline()
    assert len(before) == 2 and when_written(pipeline) == before
    assert [model["test"] for model in again["models"]] == [model["test"] for model in first["models"]]


def test_resume_with_other_settings_is_refused_and_keeps_what_is_there(finished):
    pipeline, _ = finished
    before = when_written(pipeline)
    with pytest.raises(ConfigError, match="other settings or data"):
        IntegratedMLPipeline(replace(pipeline.config, batch_size=8, resume=True)).run_complete_pipeline()
    assert len(before) == 2 and when_written(pipeline) == before


def test_a_time_limit_ends_training_with_the_learning_rate_annealed(tiny_npz, tmp_path):
    config = ExperimentConfig(
        **settings(tiny_npz, tmp_path, max_epochs=5000, early_stopping_patience=5000, time_limit=3)
    )
    record = IntegratedMLPipeline(config).train_final_model("lightning_cnn")
    assert 1 <= record.epochs < 5000
    state = torch.load(tmp_path / "checkpoints/tiny/lightning_cnn/resume.ckpt", weights_only=True)
    last_rate = state["optimizer_states"][0]["param_groups"][0]["lr"]
    assert last_rate < 0.05 * 4e-3


def test_bad_data_leaves_an_earlier_run_untouched(finished, tmp_path):
    pipeline, _ = finished
    before = (pipeline.config.results_dir / "experiment_summary.json").read_bytes()
    bad = tmp_path / "bad.npz"
    np.savez(bad, maps=np.full((9, 4, 4), 7, dtype=np.uint8), labels=np.array(CLASS_NAMES))
    config = ExperimentConfig(**settings(bad, Path(pipeline.config.output_dir)))
    with pytest.raises(DataError, match="die value 7"):
        IntegratedMLPipeline(config).run_complete_pipeline()
    assert (pipeline.config.results_dir / "experiment_summary.json").read_bytes() == before
    assert (pipeline.config.checkpoints_dir / "lightning_cnn" / "best.ckpt").exists()


def diverge(monkeypatch, *, only=None):
    """Trainings whose loss is no number: of all models, or of those of one class."""
    from simple_model import LightningCNN
    from waferlab.models.classifier import WaferClassifier

    step = WaferClassifier.training_step

    def step_on_nan(self, batch, batch_idx):
        good = only == "others" and isinstance(self, LightningCNN)
        return step(self, batch, batch_idx) if good else self._step((batch[0] * float("nan"), batch[1]), "fit")[0]

    monkeypatch.setattr(WaferClassifier, "training_step", step_on_nan)


def test_a_diverged_training_says_what_to_lower(tiny_npz, tmp_path, monkeypatch):
    diverge(monkeypatch)
    config = ExperimentConfig(**settings(tiny_npz, tmp_path))
    with pytest.raises(TrainingDivergedError, match="Lower the learning rate"):
        IntegratedMLPipeline(config).run_complete_pipeline()
    assert not (tmp_path / "results/tiny/experiment_summary.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("resume", [False, True])
def test_one_diverging_model_of_two_is_a_row_with_its_reason(resume, tiny_npz, tmp_path, monkeypatch):
    diverge(monkeypatch, only="others")
    more = {"model_type": ["torchvision_resnet", "lightning_cnn"], "max_epochs": 1}
    if resume:
        IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, **more))).run_complete_pipeline()
    config = ExperimentConfig(**settings(tiny_npz, tmp_path, **more, resume=resume))
    summary = IntegratedMLPipeline(config).run_complete_pipeline()
    assert [m["model_type"] for m in summary["models"]] == ["lightning_cnn"] == [summary["best_model"]]
    (failed,) = summary["failed_models"]
    assert failed["model_type"] == "torchvision_resnet" and "Lower the learning rate" in failed["reason"]
    written = json.loads((tmp_path / "results/tiny/experiment_summary.json").read_text())
    assert written["failed_models"] == summary["failed_models"]
    for page in ("report.html", "MODEL_CARD.md"):
        assert (tmp_path / "results/tiny" / page).exists()
    assert "torchvision_resnet could not be trained: the training loss is nan" in summary["verdict"]
    assert "torchvision_resnet could not be trained" in (tmp_path / "results/tiny/report.html").read_text().replace(
        "<wbr>", ""
    )


def test_all_models_diverging_is_one_error_that_names_each(tiny_npz, tmp_path, monkeypatch):
    diverge(monkeypatch)
    more = {"model_type": ["torchvision_resnet", "lightning_cnn"], "max_epochs": 1}
    with pytest.raises(RunError, match=r"No model could be trained\. torchvision_resnet: .*; lightning_cnn: "):
        IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, **more))).run_complete_pipeline()


def test_a_run_that_dies_while_it_registers_has_its_summary_and_its_report(tiny_npz, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(IntegratedMLPipeline, "register_best", killed)
    with pytest.raises(KeyboardInterrupt):
        IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, max_epochs=1))).run_complete_pipeline()
    summary = json.loads((tmp_path / "results/tiny/experiment_summary.json").read_text())
    assert summary["registered"] is None and "did not come to its end" in summary["not_registered_because"]
    for page in ("report.html", "MODEL_CARD.md", "confusion_matrix.png"):
        assert (tmp_path / "results/tiny" / page).exists()


@pytest.mark.parametrize("step", ["IntegratedMLPipeline.register_best", "draw_run", "write_pages"])
def test_what_fails_after_the_scores_are_known_is_a_line_in_the_summary(step, tiny_npz, tmp_path, monkeypatch):
    def fails(*_, **__):
        written = json.loads((tmp_path / "results/tiny/experiment_summary.json").read_text())
        assert written["models"][0]["test"]["macro_f1"] > 0  # it is safe before any of this is tried
        raise OSError("no space left")

    monkeypatch.setattr(f"integrated_pipeline.{step}", fails)
    summary = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path))).run_complete_pipeline()
    written = json.loads((tmp_path / "results/tiny/experiment_summary.json").read_text())
    assert written["problems"] == summary["problems"]
    assert all(problem.endswith("(OSError: no space left)") for problem in written["problems"])
    assert written["problems"] and written["registered"] is None and written["not_registered_because"]


def test_brackets_and_colons_in_a_path_are_printed_as_they_are(tiny_npz, tmp_path):
    folder = tmp_path / "fab[/b]" / "lot[red] :smile:"
    folder.mkdir(parents=True)
    shutil.copy(tiny_npz, folder / "t.npz")
    printed = io.StringIO()
    config = ExperimentConfig(**settings(folder / "t.npz", folder, quiet=False, max_epochs=1))
    IntegratedMLPipeline(config, console=Console(file=printed, highlight=False)).run_complete_pipeline()
    assert f"data       {folder / 't.npz'}" in printed.getvalue()
    assert f"Results and pictures: {folder / 'results/tiny'}" in printed.getvalue()


@pytest.mark.parametrize(("devices", "taken"), [("auto", 1), (1, 1), ("1", 1), ([1], [1])])
def test_one_device_is_taken_whichever_way_it_is_asked_for(devices, taken, tiny_npz, tmp_path, monkeypatch):
    def trainer(**options):
        assert options["devices"] == taken
        raise InterruptedError("asked as it should be")

    monkeypatch.setattr(pl, "Trainer", trainer)
    config = ExperimentConfig(**settings(tiny_npz, tmp_path, devices=devices))
    with pytest.raises(InterruptedError):
        IntegratedMLPipeline(config).train_final_model("lightning_cnn")


@pytest.mark.parametrize(("devices", "count"), [("auto", 1), (2, 2), ("3", 3), ([0, 2], 2)])
def test_devices_are_counted_or_named(devices, count):
    config = ExperimentConfig(devices=devices)
    assert config.device_count() == count and config.one_device() == (devices[:1] if isinstance(devices, list) else 1)


@pytest.mark.parametrize("devices", [-1, "-1", 0, "0", True, None, [], ["0"], "all", 1.0, 5000])
def test_devices_that_name_none_are_answered_with_a_sentence(devices):
    with pytest.raises(ConfigError, match=r"names none\. Allowed: 'auto' \(one\), how many, or a list"):
        ExperimentConfig(devices=devices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_epochs": 0}, "max_epochs=0 is out of range"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"model_type": "alexnet"}, "'alexnet' is unknown. Allowed: all, lightning_cnn"),
        ({"model_type": []}, "empty"),
        ({"experiment_name": "../up"}, "names a folder"),
        ({"balance_by": "luck"}, "Allowed: sampler, loss"),
        ({"time_limit": -5}, "time_limit=-5"),
        ({"accelerator": "banana"}, "accelerator='banana' is unknown. Allowed: auto, cpu, gpu"),
        ({"precision": "banana"}, "precision='banana' is unknown. Allowed: auto, 32-true"),
        ({"precision": 7}, "precision=7 is unknown"),
        ({"precision": "bf16-true"}, "precision='bf16-true' is unknown"),
        ({"registry_name": "fab/wafer"}, "registry_name='fab/wafer' names no model in MLflow"),
        ({"registry_name": " "}, "registry_name=' ' names no model in MLflow"),
        ({"model_type": ["all", "vision_transformer"]}, "'all' stands alone, for lightning_cnn"),
        (
            {"model_type": ["lightning_cnn", "vision_transformer"], "image_size": 44},
            "image_size=44: vision_transformer cuts images into patches of 8 pixels. Choose 40 or 48.",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(change, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[").replace(".", r"\.")):
        ExperimentConfig(**change)


def test_an_output_folder_that_cannot_be_written_is_named_before_any_work(tiny_npz, tmp_path):
    (tmp_path / "file").write_text("")
    config = ExperimentConfig(**settings(tiny_npz, tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be written"):
        IntegratedMLPipeline(config).run_complete_pipeline()


# --- the script


def run_script(*arguments, **options):
    return warm.run(
        [sys.executable, ROOT / "quick_start.py", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_a_library_that_is_not_installed_is_named_with_the_remedy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", ROOT / "quick_start.py", "--output-dir", tmp_path], capture_output=True, text=True
    )  # -S: as in an environment where nothing has been installed
    assert done.returncode == 1
    assert "pip install -r requirements.txt" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere.npz"], "no such file"),
        (["--seed", "x"], "invalid int value"),
        (["--seed", "-1"], "seed=-1"),
        (["--colour"], "unrecognized"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quick_start.py", "--no-mlflow", *arguments])
    try:
        status = quick_start.main()
    except SystemExit as stop:  # of argparse
        status = stop.code
    printed = capsys.readouterr().err
    assert status == 2
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("error", "status"),
    [(e, e.exit_status) for e in vars(errors).values() if isinstance(e, type) and hasattr(e, "exit_status")],
)
def test_every_error_of_ours_is_one_line_with_its_status(error, status, capsys):
    def work():
        raise error("what, why and the remedy")

    assert command_line.run(work) == status == (2 if issubclass(error, errors.UserError) else 1)
    assert capsys.readouterr().err == "error: what, why and the remedy\n"


WITH_SMALL_FILES = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize(
    ("limit", "status", "said"),
    [
        (1000, 2, "cannot be written"),  # said before any work
        (400_000, 1, "best.ckpt.unfinished). Raise the limit of a file's size (ulimit -f)."),
    ],
)
def test_where_files_cannot_grow_a_sentence_says_so_and_with_room_the_run_goes_on(
    limit, status, said, tiny_npz, tmp_path
):
    command = [sys.executable, "-c", WITH_SMALL_FILES]
    script = ["run_experiment.py", "--mode", "production", "--models", "lightning_cnn", "--epochs", 2, "--no-mlflow"]
    script += ["--data", tiny_npz, "--output-dir", tmp_path, "image_size=16", "enable_optuna=false"]
    script += ["use_pretrained=false"]

    def run(limit, *more):
        given = [*command, limit, ROOT / script[0], *script[1:], *more]
        return warm.run(list(map(str, given)), capture_output=True, text=True)

    done = run(limit)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1) and said in done.stderr
    assert not list(tmp_path.rglob("*.unfinished")) and not list(tmp_path.rglob("experiment_summary.json"))
    done = run(resource.RLIM_INFINITY, "--resume")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("experiment_summary.json"))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "error: No space left on device (a/file). Make room on the disk."),
        (errno.EDQUOT, "error: Disk quota exceeded (a/file). Make room in your quota."),
        (errno.EMFILE, "error: Too many open files (a/file). Raise the limit of open files (ulimit -n)."),
        (errno.EROFS, "error: Read-only file system (a/file). Choose a folder on a disk that can be written."),
    ],
)
def test_what_the_machine_refuses_is_a_sentence_with_its_remedy(number, said, capsys):
    def work():
        raise OSError(number, os.strerror(number), "a/file")

    assert command_line.run(work) == 1
    assert capsys.readouterr().err == f"{said} Finished epochs are kept: repeat the command with --resume then.\n"
    assert command_line.run(work, when_stopped="again") == 1
    assert capsys.readouterr().err == f"{said}\n"


def lack_a_library(*_, **__):
    raise ImportError("libGL.so.1: cannot open shared object file")


def test_a_library_that_the_system_lacks_costs_its_model_alone(tiny_npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("integrated_pipeline.IntegratedMLPipeline.search_and_train", lack_a_library)
    config = ExperimentConfig(**settings(tiny_npz, tmp_path, model_type=["lightning_cnn", "yolo_inspired"]))
    with pytest.raises(RunError, match=r"No model could be trained. lightning_cnn: libGL.so.1.*yolo_inspired: libGL"):
        IntegratedMLPipeline(config).run_complete_pipeline()
    assert "yolo_inspired is left out: libGL.so.1" in capsys.readouterr().err  # said by a quiet run, too
    assert command_line.run(lack_a_library) == 1
    assert "Install what is needed: pip install -r requirements.txt, and of the system" in capsys.readouterr().err


@pytest.mark.parametrize("work", [partial(np.empty, 2**55), partial(torch.empty, 2**55)])
def test_where_memory_runs_out_a_sentence_says_so(work, capsys):
    assert command_line.run(work) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: The memory does not suffice (") and said.count("\n") == 1
    assert "give fewer maps, smaller images or batches. Finished epochs are kept" in said


INTERRUPTED_AS_IT_IMPORTS = """
import sys
from waferlab import command_line

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy._core._exceptions":  # which cannot be imported a second time
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

def work():
    sys.meta_path.insert(0, Interrupts())
    import numpy

sys.exit(command_line.run(work))
"""


def test_ctrl_c_while_libraries_are_still_imported_is_no_traceback_either():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AS_IT_IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130 and done.stderr.startswith("\nStopped. Finished epochs are kept. To go on: python")


def test_an_error_that_nobody_foresaw_keeps_its_traceback():
    for error in (FileNotFoundError(errno.ENOENT, "gone"), RuntimeError("what nobody thought of")):
        with pytest.raises(type(error)):
            command_line.run(partial(throw, error))


def throw(error):
    raise error


@pytest.mark.long
def test_ctrl_c_keeps_the_state_prints_how_to_resume_and_exits_with_130(tiny_npz, tmp_path):
    given = ["--data", tiny_npz, "--output-dir", tmp_path, "--no-mlflow", "image_size=16"]
    command = [sys.executable, ROOT / "quick_start.py", *given]
    child = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "checkpoints" / "quick_start" / "torchvision_resnet"
    deadline = time.monotonic() + 120
    while not (folder / "resume.ckpt").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"--data {tiny_npz}" in errors and errors.rstrip().endswith("--resume") and "Traceback" not in errors
    done = run_script(*given, "--resume")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/5" not in done.stdout and "epoch 5/5" in done.stdout
    assert "torchvision_resnet Results: accuracy" in done.stdout


def test_pictures_of_an_earlier_run_with_a_search_are_not_shown_as_those_of_this_one(tiny_npz, tmp_path):
    results = tmp_path / "results/tiny"
    results.mkdir(parents=True)
    stale = ("optuna_lightning_cnn_history.png", "confusion_matrix_yolo_inspired.png", "per_class_yolo_inspired.csv")
    for name in (*stale, "of_mine.png"):
        (results / name).write_bytes(b"before")
    made = {"enable_optuna": False, "max_epochs": 1, "model_type": "lightning_cnn"}
    IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, **made))).run_complete_pipeline()
    assert not any((results / name).exists() for name in stale) and (results / "of_mine.png").exists()
    assert "history.png" not in (results / "report.html").read_text().replace("training_history.png", "")


def test_maps_that_a_pipeline_is_given_are_those_that_it_runs_on(tiny_npz, tmp_path, monkeypatch):
    made = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, data="synthetic", max_epochs=1)))
    made.prepare_data(load_wafer_maps(tiny_npz))
    monkeypatch.setattr("integrated_pipeline.load_wafer_maps", pytest.fail)
    assert made.run_complete_pipeline()["data"]["source"] == "tiny.npz"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ExperimentConfig(output_dir="~/runs", pretrained_dir="~/weights", artifacts="~/shared")
    assert config.output_dir == f"{tmp_path}/runs" and config.generated_weights_dir == tmp_path / "weights"
    assert config.artifacts == f"{tmp_path}/shared"

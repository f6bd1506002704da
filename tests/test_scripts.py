"""Promises about what all scripts have in common: help, flags, presets, silence; and about run_experiment's modes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import demo
import integrated_pipeline
import run_experiment
from integrated_pipeline import ExperimentConfig
from waferlab.training import pretraining

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--data", "--seed", "--output-dir", "--no-mlflow", "--resume", "--quiet")
RUNS = [("quick_start",)]
RUNS += [("demo", "--mode", mode) for mode in demo.PRESETS]
RUNS += [("run_experiment", "--mode", mode) for mode in run_experiment.PRESETS if mode != "pretrain"]


class Seen(Exception):
    """Carries what a script was about to run."""


def call(script, *arguments):
    """The exit status of a script that is given these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        return importlib.import_module(script).main()


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """Calls a script up to the moment when its pipeline would be built; returns the pipeline's configuration."""

    def build(config):
        raise Seen(config)

    def configuration(script, *arguments):
        with pytest.raises(Seen) as seen:
            call(script, *arguments)
        return seen.value.args[0]

    monkeypatch.setattr(integrated_pipeline, "IntegratedMLPipeline", build)
    return configuration


@pytest.mark.parametrize("script", ["quick_start", "demo", "run_experiment"])
def test_help_shows_the_flags_of_all_scripts_and_examples_and_loads_nothing_heavy(script):
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )  # fmt: skip
    assert done.returncode == 0
    flags, _, examples = done.stdout.partition("examples:")
    assert all(flag in flags for flag in FLAGS)
    assert f"python {script}.py" in examples
    assert not any(name in done.stderr for name in ("torch", "numpy", "mlflow", "lightning", "integrated_pipeline"))


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_the_flags_of_all_scripts_reach_the_configuration(run, configured, tmp_path):
    data = tmp_path / "maps.npz"
    config = configured(
        *run, "--data", data, "--seed", 7, "--output-dir", tmp_path, "--no-mlflow", "--resume", "--quiet"
    )
    assert (config.data, config.seed, config.output_dir) == (str(data), 7, str(tmp_path))
    assert (config.enable_mlflow, config.resume, config.quiet) == (False, True, True)


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_without_flags_each_run_is_tracked_starts_anew_and_registers(run, configured):
    config = configured(*run)
    assert (config.data, config.output_dir) == ("synthetic", ".")
    assert config.enable_mlflow and config.registry_name and not config.resume


def test_each_run_has_a_folder_of_its_own(configured):
    assert len({configured(*run).experiment_name for run in RUNS}) == len(RUNS)


def test_flags_of_run_experiment_set_the_field_that_they_name(configured):
    flags = ("--trials", 2, "--epochs", 3, "--max-samples-per-class", 4, "--models", "yolo_inspired", "lightning_cnn")
    config = configured("run_experiment", *flags)
    assert (config.num_optuna_trials, config.max_epochs, config.max_samples_per_class) == (2, 3, 4)
    assert config.model_type == ["yolo_inspired", "lightning_cnn"]
    assert config.split == "lots" and configured("run_experiment", "--split", "ordered").split == "ordered"
    assert config.time_limit is None  # so many epochs, however long they take
    assert configured("run_experiment", *flags, "--time-limit", 60).time_limit == 60
    assert configured("run_experiment", "--mode", "ablation", "--models", "all").model_type == "all"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--maps", "5"), "--mode demo has no use for --maps: leave it out, or choose --mode pretrain."),
        (("--image-size", "40"), "--mode demo has no use for --image-size"),
        (("--mode", "production", "--seeds", "1"), "or choose --mode ablation or comparison."),
        *((("--mode", "pretrain", flag, "7"), f"--mode pretrain has no use for {flag}") for flag in
          ("--data", "--trials", "--epochs", "--seeds", "--time-limit", "--max-samples-per-class")),
        (("--mode", "pretrain", "--mlflow-server"), "--mode pretrain has no use for --mlflow-server"),
    ],
)  # fmt: skip
def test_a_flag_that_a_mode_has_no_use_for_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        call("run_experiment", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--models", "alexnet"], "'alexnet' is unknown"), (["--maps", 0], "maps=0"), (["--seed", -1], "seed=-1")],
)
def test_a_wrong_value_of_pretrain_is_one_message_and_status_2(flags, message, tmp_path, capsys):
    assert call("run_experiment", "--mode", "pretrain", *flags, "--output-dir", tmp_path) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


HANDED_OVER = ("make", "fit", "precision", "say")


def test_pretrain_makes_weights_of_each_family_where_runs_look_for_them(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(pretraining, "pretrain", lambda name, **how: made.append((name, how)) or name)
    flags = ("--maps", 9, "--image-size", 16, "--seed", 3, "--resume", "--quiet", "--output-dir", tmp_path)
    assert call("run_experiment", "--mode", "pretrain", "--models", "all", *flags) == 0
    names = ExperimentConfig(model_type="all").model_types()
    assert [name for name, _ in made] == names and capsys.readouterr().out.split() == names
    (how,) = {frozenset((key, value) for key, value in how.items() if key not in HANDED_OVER) for _, how in made}
    folder = ExperimentConfig(output_dir=tmp_path).generated_weights_dir
    assert dict(how) == {"folder": folder, "maps": 9, "image_size": 16, "seed": 3, "resume": True}
    made.clear()
    assert call("run_experiment", "--mode", "pretrain") == 0
    ((name, how),) = made
    assert (name, how["maps"], how["image_size"]) == ("lightning_cnn", 200_000, ExperimentConfig().image_size)


def test_pretrain_prints_its_own_lines_and_nothing_else(tmp_path):
    command = [sys.executable, ROOT / "run_experiment.py", "--mode", "pretrain", "--maps", "1", "--image-size", "16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    (file,) = (tmp_path / "checkpoints/pretrained").glob("lightning_cnn-*.safetensors")
    model, epoch, score = done.stdout.splitlines()
    assert model == "lightning_cnn" and "epoch 1/1" in epoch and file.name in score
    assert not (tmp_path / "mlflow.db").exists()

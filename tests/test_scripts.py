"""Promises about what all scripts have in common: help, flags, presets, silence; and about run_experiment's modes."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import warm

import demo
import integrated_pipeline
import quick_start
import run_experiment
from integrated_pipeline import ExperimentConfig
from waferlab import command_line
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
    flags = (
        "--trials",
        2,
        "--workers",
        5,
        "--epochs",
        3,
        "--max-samples-per-class",
        4,
        "--models",
        "yolo_inspired",
        "lightning_cnn",
    )
    config = configured("run_experiment", *flags)
    assert (config.num_optuna_trials, config.max_epochs, config.max_samples_per_class) == (2, 3, 4)
    assert config.workers == 5
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
        (("--mode", "comparison", "--seeds", "image_size=48"), "argument --seeds: expected at least one value"),
        (("--mode", "ablation", "--epochs", "3", "--time-limit", "60"), "leave out one of --epochs and --time-limit"),
    ],
)  # fmt: skip
def test_a_flag_that_a_mode_has_no_use_for_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        call("run_experiment", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials", 1], "--trials is of a search, and there is none: leave it out, or add enable_optuna=true."),
        (["--workers", 1], "--workers is of a search"),
        (["--epochs", 3, "time_limit=60"], "--epochs 3 beside time_limit=60: comparison compares at equal epochs or"),
        (["--seed", 7], "seed=7: comparison takes --seeds. Leave it out."),
        (["max_epochs=3"], "max_epochs=3: comparison gives each training its seconds; see --epochs. Leave it out."),
        (["early_stopping_patience=5"], "early_stopping_patience=5: comparison gives each training its seconds"),
        (["--mode", "ablation", "class_balancing=false"], "class_balancing=False: ablation switches it on and off"),
        (["--mode", "pretrain", "time_limit=60"], "time_limit=60: --mode pretrain has no use for time_limit."),
    ],
)
def test_a_flag_or_an_option_without_effect_is_refused(flags, message, tmp_path, capsys):
    assert call("run_experiment", "--mode", "comparison", *flags, "--output-dir", tmp_path) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("option", ["trainer={limit_train_batches: 2}", "accumulate_grad_batches=2"])
def test_pretrain_refuses_what_its_weights_would_not_tell(option, tmp_path, capsys):
    assert call("run_experiment", "--mode", "pretrain", option, "--output-dir", tmp_path) == 2
    assert "--mode pretrain has no use for" in capsys.readouterr().err


def test_the_hint_to_go_on_names_the_script_where_it_lies(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/opt/wafer/demo.py", "--seed", "1"])

    def stop():
        raise KeyboardInterrupt

    assert command_line.run(stop) == 130
    assert "To go on: python /opt/wafer/demo.py --seed 1 --resume" in capsys.readouterr().err


def test_what_a_terminal_would_carry_out_is_printed_in_words_also_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        call("predict", "lot1.npz", "\x1b]0;owned\x07.npz")
    printed = capsys.readouterr().err
    assert r"unrecognized arguments: \x1b]0;owned\x07.npz" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "alexnet"], "'alexnet' is unknown"),
        (["--maps", 0], "--maps 0 is out of range"),
        (["--maps", "9" * 400], "is out of range. Allowed: 1 to 1,000,000,000."),
        (["--seed", -1], "seed=-1"),
    ],
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


@pytest.mark.long
def test_pretrain_prints_its_own_lines_and_nothing_else(tmp_path):
    command = [sys.executable, ROOT / "run_experiment.py", "--mode", "pretrain", "--maps", "1", "--image-size", "16"]
    done = warm.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    (file,) = (tmp_path / "checkpoints/pretrained").glob("lightning_cnn-*.safetensors")
    model, epoch, score = done.stdout.splitlines()
    assert model == "lightning_cnn" and "epoch 1/1" in epoch and file.name in score
    assert not (tmp_path / "mlflow.db").exists()


# --- options from files and NAME=VALUE


def test_over_a_preset_counts_a_file_over_it_a_flag_and_over_all_an_option(configured, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 1\nimage_size: 24\nlearning_rate: 2e-3\nmax_epochs: 7\n")
    config = configured("quick_start", "--config", file, "--seed", 2, "image_size=28", "objectives=[macro_f1, latency]")
    assert (config.seed, config.image_size, config.learning_rate, config.max_epochs) == (2, 28, 0.002, 7)
    assert list(config.objectives) == ["macro_f1", "latency"]
    assert config.model_type == quick_start.PRESET["model_type"]  # what nothing else says


def test_an_option_over_its_flag_and_options_anywhere_among_flags(configured):
    config = configured("run_experiment", "seed=4", "--mode", "comparison", "--seed", 3, "--models", "lightning_cnn",
                        "yolo_inspired", "image_size=48", "--quiet", "learning_rate=1e-3")  # fmt: skip
    assert (config.seed, config.image_size, config.learning_rate) == (4, 48, 0.001)
    assert config.model_type == ["lightning_cnn", "yolo_inspired"] and config.quiet


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["imagesize=32"], "'imagesize' is no option. Did you mean 'image_size'?"),
        (["32"], "'32' is no option. Write NAME=VALUE"),
        (["image_size=[32"], "'image_size=[32'"),
        (["image_size=tall"], "image_size='tall' is out of range"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
    ],
)
def test_a_wrong_option_is_one_message_and_status_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("quick_start", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sed: 1\n", "'sed' is no option. Did you mean 'seed'?"),
        ("- seed\n", "holds no options"),
        ("", "holds no options"),
        ("seed: [1\n", "cannot be read as YAML"),
        ("seed: !!python/object/apply:os.mkdir [ran]\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert call("quick_start", "--config", file) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"error: {file}") and said in found
    assert list(tmp_path.iterdir()) == [file]  # no code that the file asks for has run


def test_seeds_that_are_none_are_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        call("run_experiment", "--mode", "comparison", "--seeds", "1", "two")
    assert "--seeds" in capsys.readouterr().err


def test_the_file_that_a_run_leaves_repeats_it(configured, tmp_path):
    first = configured("run_experiment", "--mode", "production", "--seed", 5, "trainer={gradient_clip_val: 1.0}",
                       "--models", "lightning_cnn")  # fmt: skip
    first.write_yaml(tmp_path / "config.yaml")
    again = configured("quick_start", "--config", tmp_path / "config.yaml", "--output-dir", tmp_path)
    assert again == replace(first, output_dir=str(tmp_path), objectives=["macro_f1"])


@pytest.mark.long
def test_no_file_no_line_and_no_run_of_a_whole_run_holds_a_password(postgres, tiny_npz, tmp_path, capfd):
    storage = postgres.url.replace("optuna@", "optuna:s3cret@")  # the server lets everybody in
    small = ("image_size=16", "search_epochs=1", "threads=1", "workers=1", "use_pretrained=false")
    run = ("run_experiment", "--mode", "production", "--models", "lightning_cnn", "--trials", 1, "--epochs", 1, *small)
    assert call(*run, "--data", tiny_npz, "--output-dir", tmp_path, f"storage={storage}") == 0
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file != tiny_npz]
    assert {"experiment_summary.json", "report.html", "config.yaml", "mlflow.db"} <= {file.name for file in written}
    assert [file for file in written if b"s3cret" in file.read_bytes()] == []
    summary = next(file for file in written if file.name == "experiment_summary.json").read_text()
    assert "storage=postgresql+psycopg://optuna@127.0.0.1" in summary
    assert "s3cret" not in "".join(capfd.readouterr())
    (study,) = optuna.get_all_study_summaries(postgres.url)
    assert "s3cret" not in str(study.user_attrs) and study.user_attrs["search"]


def test_a_password_in_an_address_is_written_nowhere(configured, tmp_path):
    storage, uri = "postgresql+psycopg://me:s3cret@db:5432/optuna", "http://me:s3cret@mlflow:5000"
    config = configured("quick_start", f"storage={storage}", f"tracking_uri={uri}")
    assert (config.storage, config.tracking_uri) == (storage, uri)
    config.write_yaml(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "s3cret" not in text and "postgresql+psycopg://me@db:5432/optuna" in text and "http://me@mlflow" in text
    config = configured("quick_start", "storage=sqlite:////tmp/study.db")
    assert config.as_plain()["storage"] == "sqlite:////tmp/study.db"

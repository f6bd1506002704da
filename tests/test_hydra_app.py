"""The Hydra example: groups, overrides, one run for each combination, and what it says when it cannot."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import warm

pytest.importorskip("hydra", reason="the extra `hydra` is not installed")
FILE = Path(__file__).resolve().parent.parent / "examples" / "hydra_app.py"


@pytest.fixture
def app(monkeypatch):
    """Starts the example with arguments up to its runs; returns their configurations, and the exit status."""
    spec = importlib.util.spec_from_file_location("hydra_app", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(*arguments):
        configurations = []

        class Pipeline:
            def __init__(self, config):
                configurations.append(config)

            def run_complete_pipeline(self):
                return {"models": [{"model_type": "any", "test": {"macro_f1": 0.5}}]}

        monkeypatch.setattr(module, "IntegratedMLPipeline", Pipeline)
        monkeypatch.setattr(sys, "argv", [str(FILE), *arguments])
        return module.command_line.run(module.main), configurations

    return start


def test_groups_and_options_make_one_run(app):
    status, (config,) = app("model=yolo", "budget=search", "image_size=48", "learning_rate=2e-3")
    assert status == 0
    assert (config.model_type, config.enable_optuna, config.time_limit) == ("yolo_inspired", True, 600)
    assert (config.image_size, config.learning_rate, config.experiment_name) == (48, 0.002, "hydra")


def test_a_multirun_is_a_run_for_each_combination_in_a_folder_of_its_own(app, capsys):
    status, configurations = app("--multirun", "seed=0,1", "model=small,all", "max_epochs=3")
    assert status == 0 and all(config.max_epochs == 3 for config in configurations)
    found = {(config.seed, config.model_type): config.experiment_name for config in configurations}
    assert found == {
        (0, "lightning_cnn"): "hydra_seed=0_model=small",
        (0, "all"): "hydra_seed=0_model=all",
        (1, "lightning_cnn"): "hydra_seed=1_model=small",
        (1, "all"): "hydra_seed=1_model=all",
    }
    assert capsys.readouterr().out.count("macro F1 {'any': 0.5}") == 4


@pytest.mark.long
def test_a_multirun_trains_and_scores_each_of_its_runs(tiny_npz, tmp_path):
    small = [f"{name}=false" for name in ("enable_optuna", "enable_mlflow", "use_pretrained")]
    small += ["image_size=16", "batch_size=16", "max_epochs=1", "threads=1", "quiet=true", "time_limit=null"]
    asked = ["--multirun", "seed=0,1", "model=small", f"data={tiny_npz}", f"output_dir={tmp_path}", *small]
    done = warm.run([sys.executable, FILE, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = re.findall(r"^hydra_seed=\d: macro F1 \{'lightning_cnn': 0\.\d+\}$", done.stdout, re.M)
    files = sorted((tmp_path / "results").glob("*/experiment_summary.json"))
    summaries = [json.loads(file.read_text()) for file in files]
    assert len(scores) == 2 and [summary["config"]["seed"] for summary in summaries] == [0, 1]
    assert len({summary["split"]["fingerprint"] for summary in summaries}) == 2


def test_several_runs_are_started_only_if_asked_for(app, capsys):
    assert app("seed=0,1") == (2, [])
    assert "add --multirun" in capsys.readouterr().err


def test_an_unknown_option_names_the_nearest(app, capsys):
    assert app("imge_size=3") == (2, [])
    assert "Did you mean 'image_size'?" in capsys.readouterr().err

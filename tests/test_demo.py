"""Promises about demo.py: its help, its presets, its page."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import warm

import demo
from integrated_pipeline import ExperimentConfig

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"ultra": 120, "quick": 180, "full": 300}


def run_script(*arguments, **options):
    command = [sys.executable, ROOT / "demo.py", *map(str, arguments)]
    return warm.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize("mode", list(BUDGETS))
def test_each_mode_leaves_time_beside_the_training(mode):
    config = ExperimentConfig(**demo.PRESETS[mode])
    assert config.enable_optuna
    assert config.time_limit < 0.85 * BUDGETS[mode]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "mega"], "invalid choice: 'mega'"),
        (["--start-mlflow", "--no-mlflow"], "Leave out one of the two"),
        (["--data", "/nowhere.npz"], "no such file"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(arguments, message, tmp_path):
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.long
def test_the_page_is_up_before_training_and_gone_after_ctrl_c(tiny_npz, tmp_path):
    command = [sys.executable, ROOT / "demo.py", "--start-mlflow", "--data", tiny_npz, "--output-dir", tmp_path]
    child = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    lines = []
    deadline = time.monotonic() + 120
    while not any("trial 1/" in line for line in lines):
        assert child.poll() is None and time.monotonic() < deadline, lines
        lines.append(child.stdout.readline())
    text = "".join(lines)
    link = re.search(r"MLflow: (http://127\.0\.0\.1:\d+)/#/experiments/\d+/runs", text)
    assert text.index("MLflow: http") < text.index("trial 1/")
    with urlopen(link[1]) as page:
        assert page.status == 200
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "--resume" in errors
    with pytest.raises(OSError):
        urlopen(link[1], timeout=5)

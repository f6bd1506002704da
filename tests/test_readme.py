"""Promises about the README: its examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTENDING = (ROOT / "README.md").read_text().partition("\n## Extending\n")[2].partition("\n## ")[0]
EXAMPLES = dict(re.findall(r"\*\*(.+?)\.\*\*.*?```python\n(.*?)```", EXTENDING, re.S))


def test_there_is_an_example_for_each_way_to_extend():
    assert list(EXAMPLES) == ["Your own data", "Your own architecture", "Your own objective", "Your own Trainer"]


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_examples_run_as_they_stand(title, tmp_path):
    (tmp_path / "example.py").write_text(EXAMPLES[title])
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    runs_the_pipeline = "run_complete_pipeline" in EXAMPLES[title]
    assert (tmp_path / "results/wafer_defect_complete/experiment_summary.json").exists() == runs_the_pipeline


MEET = (ROOT / "README.md").read_text().partition("\n## How the tools meet\n")[2].partition("\n## ")[0]
CODE = "\n".join(
    line.strip()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("waferlab/**/*.py")]
    for line in file.read_text().splitlines()
)


QUOTES = re.findall(r"```python\n(.*?)```", MEET, re.S)


def test_each_integration_is_shown_by_a_quote():
    assert len(QUOTES) == MEET.count("\n**")


@pytest.mark.parametrize("block", QUOTES)
def test_the_lines_that_it_quotes_are_in_the_code(block):
    assert "\n".join(line.strip() for line in block.strip().splitlines()) in CODE

"""Promises about the guide: each chapter runs as it stands, and has all that a chapter has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "docs/guide").glob("[0-9]*.py"))


def test_the_guide_has_ten_chapters_and_lists_them_in_order():
    listed = re.findall(r"^(\d\d_\w+)$", (ROOT / "docs/guide/index.md").read_text(), re.M)
    assert listed == [chapter.stem for chapter in CHAPTERS] and len(listed) == 10


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_runs_as_a_notebook_and_what_it_claims_holds(chapter, executed_chapter):
    cells = json.loads(executed_chapter(chapter).read_text())["cells"]
    assert any(cell.get("outputs") for cell in cells)


@pytest.mark.long
def test_a_chapter_runs_as_a_script(tmp_path):
    done = subprocess.run(
        [sys.executable, CHAPTERS[0]], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("\n") > 5, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_a_chapter_has_a_goal_both_ways_a_trap_and_an_exercise_with_a_checked_answer(chapter):
    text = chapter.read_text()
    assert "# **Goal.** " in text and re.search(r"^# (##|\*\*).*\bBefore\b", text, re.M)
    assert re.search(r"^# (##|\*\*).*\bAfter\b", text, re.M) and re.search(r"^# ## The traps?\b", text, re.M)
    question, _, answer = text.partition("# ## Exercise\n")[2].partition('# %% tags=["hide-cell"]\n')
    assert len(question) > 100 and "assert " in answer
    assert text.count("\nassert ") + text.count("\n    assert ") >= 4

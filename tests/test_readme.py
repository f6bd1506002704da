"""Promises about the README and the pages in docs/: their examples run as they stand."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import warm

from integrated_pipeline import IntegratedMLPipeline

ROOT = Path(__file__).resolve().parent.parent
HOW_TO = ROOT / "docs/how_to"
WAYS = ("data", "objective", "trainer")  # the architecture's are in test_newcomer.py
EXAMPLES = {way: re.search(r"```python\n(.*?)```", (HOW_TO / f"{way}.md").read_text(), re.S)[1] for way in WAYS}


@pytest.mark.long
@pytest.mark.parametrize("title", EXAMPLES)
def test_the_examples_run_as_they_stand(title, tmp_path):
    (tmp_path / "example.py").write_text(EXAMPLES[title])
    done = warm.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    runs_the_pipeline = "run_complete_pipeline" in EXAMPLES[title]
    assert (tmp_path / "results/wafer_defect_complete/experiment_summary.json").exists() == runs_the_pipeline


def test_the_call_that_the_readme_shows_is_one(monkeypatch):
    asked = []
    monkeypatch.setattr(IntegratedMLPipeline, "run_complete_pipeline", lambda pipeline: asked.append(pipeline.config))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(block, {})
    assert [config.time_limit for config in asked] == [600]


TRIED = {  # what stands on the page of troubles: where its remedy is tried
    "The MLflow page does not open": "test_a_taken_port_is_passed_over",
    "MLflow does not show my experiment": "test_the_outcome_ends_with_the_way_to_the_runs_page",
    "Out of memory": "test_a_trial_without_memory_or_with_nan_fails_with_its_reason_and_the_study_goes_on",
    "The machine refuses": "test_where_files_cannot_grow_a_sentence_says_so_and_with_room_the_run_goes_on",
    "It is slow": "test_who_leaves_cores_to_others_by_openmps_variable_has_no_more_taken",
    "No network": "test_a_host_that_swallows_packets_costs_the_bounded_wait_only",
    "A GPU": "",  # there is none here
    "The database of a search went away": (
        "test_a_database_that_does_not_come_back_is_a_sentence_and_the_searchs_own_affair_no_models"
    ),
    "A search was cut off": "test_a_trial_goes_on_after_the_last_whole_epoch_of_the_one_that_was_cut_off",
    "`--resume` refuses": "test_resume_with_other_settings_is_refused_and_keeps_what_is_there",
    "The MLflow server was away": "test_an_outage_delays_what_is_written",
    "A file is damaged": "test_a_damaged_file_is_one_sentence_and_its_remedy_works",
    "A better model stays challenger": "test_a_champion_that_has_trained_on_nearly_all_of_the_test_maps",
}


def test_each_remedy_on_the_page_of_troubles_is_tried_by_a_test():
    titles = re.findall(r"^- \*\*(.+?)\.\*\*", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert titles == list(TRIED)
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"\ndef {name}" in tests for name in TRIED.values() if name)


MEET = (ROOT / "docs/design.md").read_text().partition("\n## How the tools meet\n")[2].partition("\n## ")[0]
CODE = "\n".join(
    line.strip()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("waferlab/**/*.py")]
    for line in file.read_text().splitlines()
)


QUOTES = re.findall(r"```python\n(.*?)```", MEET, re.S)


def test_each_integration_is_shown_by_a_quote():
    assert QUOTES and len(QUOTES) == MEET.count("\n**")


@pytest.mark.parametrize("block", QUOTES)
def test_the_lines_that_it_quotes_are_in_the_code(block):
    assert "\n".join(line.strip() for line in block.strip().splitlines()) in CODE


# --- after training: the commands of the section, in a folder where a small champion is registered

AFTER = (HOW_TO / "serving.md").read_text()
SHOWN = re.findall(r"^    \$ (.*)\n((?:    (?!\$).*\n)*)", AFTER, re.M)
NAMES = "Center|Donut|Edge-Loc|Edge-Ring|Loc|Near-full|Random|Scratch|none"


def as_pattern(line):
    """What a line of the README promises of an output: all but numbers, classes and what dots stand for."""
    line = re.sub(rf"\b({NAMES})(\|({NAMES}))*(?=[|, (\"]|$)", "CLASSES", line)
    line = re.sub(r"\d[\d,]*(\.\d+)?", "NUMBER", line)
    line = re.escape(line).replace("CLASSES", rf"((({NAMES})\|?)+|empty)").replace("NUMBER", r"[\d.,e-]+")
    return line.replace(re.escape("..."), ".*")


def assert_shows(output, expected):
    """The lines of the README are in the output, in this order."""
    lines = iter([" ".join(line.split()) for line in output.splitlines()])  # figures move what stands in columns
    for wanted in (" ".join(line.split()) for line in expected.splitlines() if line.strip() != "..."):
        assert any(re.search(as_pattern(wanted), line) for line in lines), f"{wanted!r} is not in:\n{output[-3000:]}"


@pytest.mark.long
def test_quick_start_prints_what_the_readme_shows(tmp_path):
    shown = (ROOT / "README.md").read_text().partition("## What you see\n")[2].partition("![")[0]
    few = ["samples_per_class=40", "max_epochs=1", "image_size=16", "--no-mlflow"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "quick_start.py"), *few], capture_output=True, **in_the_folder(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert shown.count("\n    ") > 8
    assert_shows(done.stdout, re.sub("split [0-9a-f]+", "split", shown).strip())


@pytest.fixture(scope="module")
def champions_folder(tiny_arrays, tmp_path_factory):
    """A folder after a training with MLflow."""
    import numpy as np
    from made_up import pipeline_in

    folder = tmp_path_factory.mktemp("after")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    summary = pipeline_in(folder, enable_mlflow=True).run_complete_pipeline()
    assert summary["registered"]["alias"] == "champion", summary["not_registered_because"]
    return folder


def in_words(command):
    return [sys.executable, str(ROOT / "predict.py"), *command.split()[2:]]


def in_the_folder(folder):
    activated = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    elsewhere = {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"}  # an MLflow of the user's goes before that of the folder
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    return {"cwd": folder, "env": environment | {"PYTHONPATH": str(ROOT), "PATH": activated}, "text": True}


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c, _ in SHOWN if c.startswith("python predict.py synthetic")])
def test_predicting_says_what_the_readme_shows(command, champions_folder):
    done = subprocess.run(in_words(command), capture_output=True, **in_the_folder(champions_folder))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_shows(done.stdout, dict(SHOWN)[command])
    if "--monitor" not in command:
        rows = (champions_folder / "predictions.csv").read_text()
        assert_shows("\n".join(rows.splitlines()[:2]), dict(SHOWN)["head -2 predictions.csv"])


@pytest.mark.long
@pytest.mark.parametrize("served_by", ["python predict.py --serve", "mlflow models serve"])
def test_both_servers_answer_as_the_readme_shows(served_by, champions_folder):
    command, said = next((c, expected) for c, expected in SHOWN if c.startswith(served_by))
    port = "8000" if "predict.py" in command else "5001"
    question = next(c for c, _ in SHOWN if c.startswith("curl") and port in c)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    start = [*in_words(command), "--port", free]
    if "predict.py" not in command:
        start = [str(Path(sys.executable).with_name("mlflow")), *command.replace(port, free).split()[1:]]
    log = champions_folder / f"{port}.log"
    with log.open("w") as written:
        server = subprocess.Popen(
            start, stdout=written, stderr=written, start_new_session=True, **in_the_folder(champions_folder)
        )
    try:
        answer = ask_until_answered(question.replace(port, free), server, log)
        assert_shows(answer, dict(SHOWN)[question])
        assert_shows(log.read_text(), said)
        assert_same_answer(json.loads(answer), question, champions_folder)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def assert_same_answer(answer, question, folder):
    """As the predictor gives in Python."""
    import numpy as np

    from waferlab.deployment import Predictor

    asked = json.loads(shlex.split(question)[-1])
    maps = [np.array(one, np.uint8) for one in (asked.get("maps") or asked["inputs"]["maps"])]
    predictor = Predictor.load(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    expected = predictor.predict(maps)
    if "predictions" in answer:
        found = answer["predictions"]["probabilities"]
    else:
        (one,) = answer["answers"]
        found = [[one["probabilities"][name] for name in predictor.class_names]]
        assert (one["class"], one["set"], one["abstain"]) == (
            expected.classes[0], list(expected.set_names()[0]), bool(expected.abstains[0])
        )  # fmt: skip
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-5)


def ask_until_answered(question, server, log):
    """What the README asks with curl, which not every machine has."""
    _, _, url, _, header, _, body = shlex.split(question)
    request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
    for _ in range(240):
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.read().decode()
        except urllib.error.URLError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def test_the_lines_of_python_run_as_they_stand(champions_folder):
    (code,) = re.findall(r"```python\n(.*?)```", AFTER, re.S)
    maps = "import numpy as np\nmaps = [np.ones((9, 8), np.uint8)]\n"
    done = subprocess.run(
        [sys.executable, "-c", maps + code], capture_output=True, **in_the_folder(champions_folder)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(rf"\['({NAMES})'\] \[\(.*\)\] \[ ?(True|False)\]\n", done.stdout)


def test_every_command_of_the_section_is_run():
    kinds = ("python predict.py synthetic", "head -2", "python predict.py --serve", "curl", "mlflow models serve")
    assert [sum(command.startswith(kind) for command, _ in SHOWN) for kind in kinds] == [2, 1, 1, 2, 1]
    assert len(SHOWN) == 7

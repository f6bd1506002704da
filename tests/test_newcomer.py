"""Promises to newcomers: three tasks, each done with nothing but what a page prints, as it prints it."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
HOW_TO = ROOT / "docs/how_to"


def section(page, title):
    """The text below one heading of a page."""
    return (HOW_TO / page).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands_in(text):
    """The lines that one types, with the figures of an output below them left out."""
    return re.findall(r"^    (?:\$ )?((?:python|curl|mlflow) .*)$", text, re.M)


def shell(folder):
    """How a newcomer's terminal stands: in the repository, with the environment on."""
    activated = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    elsewhere = {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "OMP_NUM_THREADS"}
    return {"cwd": folder, "env": {k: v for k, v in os.environ.items() if k not in elsewhere} | {"PATH": activated}}


def type_in(command, folder):
    program, *words = shlex.split(command)
    assert program == "python"
    done = warm.run([sys.executable, *words], capture_output=True, text=True, **shell(folder))
    assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-3000:])
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What a clone looks like to whoever types commands in it."""
    folder = tmp_path_factory.mktemp("clone")
    for file in (*ROOT.glob("*.py"), ROOT / "waferlab"):
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def trained_on_images(repository, tiny_maps):
    """The first task: a folder of images as the page describes it, and the commands of the page."""
    from PIL import Image

    from waferlab.data.maps import CLASS_NAMES

    greys = np.array([0, 128, 255], np.uint8)  # black, grey, white
    for number in range(0, len(tiny_maps), 3):
        folder = repository / "my_images" / CLASS_NAMES[tiny_maps.labels[number]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(greys[tiny_maps[number]]).save(folder / f"wafer_{number}.png")
    (repository / "tomorrows_images").mkdir()
    for number in range(5):
        Image.fromarray(greys[tiny_maps[number]]).save(repository / f"tomorrows_images/{number}.png")
    commands = commands_in(section("data.md", "A folder of images"))
    assert [command.split()[1] for command in commands] == ["quick_start.py", "predict.py"]
    return repository, [type_in(command, repository) for command in commands]


def test_a_folder_of_images_trains_a_model_that_answers_new_images(trained_on_images):
    folder, (training, answers) = trained_on_images
    assert "three grey levels" in training and "each image is its own" in training
    assert "5 maps" in answers
    with (folder / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_new_maps_are_answered_over_http(trained_on_images):
    folder, _ = trained_on_images
    typed = commands_in((HOW_TO / "serving.md").read_text())
    start = next(command for command in typed if "--serve" in command)
    question = next(command for command in typed if "curl" in command and "8000" in command)
    _, *words = shlex.split(f"{start} --port 0")
    server = warm.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, **shell(folder))
    try:
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://[0-9.:]+", line)))
        answer = ask(question.replace("http://127.0.0.1:8000", address))
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, 143)
    (one,) = answer["answers"]
    assert one["class"] in one["probabilities"] and sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-3)


def ask(question):
    """What the page asks with curl, which not every machine has."""
    _, _, url, _, header, _, body = shlex.split(question)
    request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.long
def test_an_architecture_of_ones_own_is_found_in_mlflow(tmp_path):
    text = (HOW_TO / "architecture.md").read_text()
    add, find = re.findall(r"```python\n(.*?)```", text, re.S)
    for file in (*ROOT.glob("*.py"), ROOT / "waferlab"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "add.py").write_text(add)
    (tmp_path / "find.py").write_text(find)
    type_in("python add.py", tmp_path)
    shown = type_in("python find.py", tmp_path)
    assert re.search(r"two_layers\w* +FINISHED +0\.\d+ +0\.\d+", shown), shown

"""Promises about the image: what is installed and copied there answers alone. Its steps are run as plain commands.

No container is built. One step is stood in for: where the image runs pip, the test links from its own environment what
the list asks for, each distribution with all that it requires and nothing else. That needs no network and takes a
second instead of half a minute, and the versions are those that every other test has run with.
"""

import ast
import json
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from waferlab.deployment.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy"
DOCKERFILE = DockerfileParser(path=str(FOLDER / "Dockerfile"))
STEPS = [(step["instruction"], step["value"]) for step in DOCKERFILE.structure if step["instruction"] != "COMMENT"]
LAST_STAGE = STEPS[max(i for i, (instruction, _) in enumerate(STEPS) if instruction == "FROM") :]


def values(instruction, steps=LAST_STAGE):
    return [value for name, value in steps if name == instruction]


def copied(steps=LAST_STAGE):
    """(source, destination) of what is copied from the repository."""
    words = [shlex.split(value) for value in values("COPY", steps) if "--from=" not in value]
    return [[word for word in line if not word.startswith("--")] for line in words]


def requirements(file):
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {canonicalize_name((one := Requirement(line)).name): one for line in lines}


def with_all_they_need(wanted):
    """The distributions of this environment that pip would install for these requirements."""
    waiting, found = [*wanted], {}
    while waiting:
        one = waiting.pop()
        here = distribution(one.name)
        assert one.specifier.contains(here.version), f"{one}: {here.version} is installed"
        if (key := (canonicalize_name(one.name), *sorted(one.extras))) not in found:
            found[key] = here
            needed = [Requirement(line) for line in here.requires or ()]
            extras = one.extras or {""}
            waiting += [n for n in needed if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]
    return found.values()


def link(here, folder):
    for file in here.files:
        if ".." not in file.parts and not (folder / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(file.locate())


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The file system of the last stage, as far as it is ours, and how to run something in it."""
    root = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(root / "venv")}))
    for here in with_all_they_need(requirements(FOLDER / "requirements.txt").values()):
        link(here, packages)
    app = root / values("WORKDIR")[0].lstrip("/")
    app.mkdir()
    for source, destination in copied():
        target = app / destination
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / source, target / source if destination.endswith("/") else target)
    writable = tmp_path_factory.mktemp("tmp")  # ONNX Runtime leaves a file there
    environment = {name: value for name, value in DOCKERFILE.envs.items() if name != "PATH"}
    environment |= {"PATH": f"{root}/venv/bin:/usr/bin:/bin", "TMPDIR": str(writable), "HOME": "/nonexistent"}
    for folder in (app, *(path for path in app.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    yield SimpleNamespace(root=root, options={"cwd": app, "env": environment, "text": True})
    for folder in (app, *(path for path in app.rglob("*") if path.is_dir())):
        folder.chmod(0o755)


@pytest.mark.parametrize("file", ["Dockerfile", "training.Dockerfile"])
def test_the_linter_has_nothing_to_say(file):
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    done = subprocess.run([hadolint, "--no-color", FOLDER / file], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_the_image_installs_is_a_part_of_requirements_txt_with_the_same_floors():
    ours, all_of_them = requirements(FOLDER / "requirements.txt"), requirements(ROOT / "requirements.txt")
    assert ours and ours.items() <= all_of_them.items()


def test_nothing_is_installed_that_predicting_does_not_import():
    imported = set()
    for file in (ROOT / "predict.py", *(ROOT / "waferlab/deployment").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    for name in requirements(FOLDER / "requirements.txt"):
        assert imported & {file.parts[0] for file in distribution(name).files}, f"nothing imports {name}"


def test_docker_is_shown_what_it_copies_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines and "**/__pycache__" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == {source for source, _ in copied(STEPS)}


def test_the_image_has_a_python_that_this_project_runs_on():
    (argument,) = values("ARG", STEPS)
    python = argument.removeprefix("PYTHON_IMAGE=python:").partition("-")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)


def test_the_last_stage_installs_nothing_and_runs_as_a_user_of_whom_kubernetes_sees_that_it_is_not_root():
    (command,) = values("RUN")
    gone, emptied = command.split(" && ")
    assert gone.startswith("pip uninstall ") and gone.endswith(" pip") and emptied.endswith("/ensurepip")
    user, group = values("USER")[0].split(":")
    assert int(user) > 0 and int(group) > 0


ANSWER = """
import importlib.util, json, sys
import numpy as np
from waferlab.deployment.predictor import Predictor

answers = Predictor(sys.argv[1]).predict([np.array(json.loads(sys.argv[2]), np.uint8)])
unwanted = ("torch", "torchvision", "lightning", "mlflow", "ultralytics", "matplotlib", "pip", "setuptools")
found = [name for name in unwanted if importlib.util.find_spec(name)]
print(json.dumps({"found": found, "classes": answers.classes, "probabilities": answers.probabilities.tolist()}))
"""


@pytest.mark.long
def test_what_is_in_the_image_answers_a_map_without_torch_lightning_or_mlflow(image, exported):
    one = np.random.default_rng(0).integers(0, 3, (12, 9), dtype=np.uint8)
    command = ["python", "-c", ANSWER, exported("lightning_cnn"), json.dumps(one.tolist())]
    done = subprocess.run(command, capture_output=True, **image.options)
    assert done.returncode == 0, done.stderr[-2000:]
    answer, expected = json.loads(done.stdout), Predictor(exported("lightning_cnn")).predict([one])
    assert (answer["found"], answer["classes"]) == ([], expected.classes)
    np.testing.assert_allclose(answer["probabilities"], expected.probabilities, atol=1e-6)


def test_the_service_starts_is_healthy_and_writes_no_file_outside_of_tmp(image, exported, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = {"/model/model.onnx": str(exported("lightning_cnn")), "0.0.0.0": "127.0.0.1", "8000": port}
    command = [here.get(word, word) for word in json.loads(values("CMD")[0])]
    assert sum(word in here.values() for word in command) == 3
    check = json.loads(values("HEALTHCHECK")[0].partition("CMD ")[2].replace("8000", port))
    before, log = sorted(image.root.rglob("*")), tmp_path / "log"
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said, **image.options) as service:
        try:
            healthy, patience = False, time.monotonic() + 60
            while not healthy and service.poll() is None and time.monotonic() < patience:
                healthy = subprocess.run(check, capture_output=True, **image.options).returncode == 0
            assert healthy, log.read_text()[-2000:]
        finally:
            service.terminate()
    assert sorted(image.root.rglob("*")) == before
    assert subprocess.run(check, capture_output=True, **image.options).returncode == 1  # nobody is there

"""Promises about installing: what the wheel holds, what it asks for, under which licence."""

import email
import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # sha256 of apache.org's LICENSE-2.0.txt


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def requirements(lines):
    """By name, so that order and spelling do not matter."""
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith(("#", "-"))]
    return {one.name.lower(): (frozenset(one.extras), one.specifier) for one in parsed}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as from a clean clone, with what this environment has."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in tracked_files():
        if not name.startswith(("benchmarks/results/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", built]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_package_with_its_templates_and_two_modules_and_nothing_else(wheel):
    product = {name for name in tracked_files() if name.startswith("waferlab/")}
    assert any(name.endswith((".html", ".j2", ".md")) for name in product)
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == product | {"integrated_pipeline.py", "simple_model.py"}


def test_the_wheel_asks_for_what_requirements_txt_lists(metadata):
    asked = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert requirements(asked) == requirements((ROOT / "requirements.txt").read_text().splitlines())


def test_the_wheel_names_its_licence_and_brings_the_text(wheel, metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    (name,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_licence_is_apaches_word_for_word_with_a_note_on_ultralytics_below():
    text, rule, note = re.split(r"^(-{80}\n)", (ROOT / "LICENSE").read_text(), flags=re.MULTILINE)
    assert rule and hashlib.sha256(text.removesuffix("\n").encode()).hexdigest() == APACHE
    assert "ultralytics" in note and "AGPL-3.0" in note


def test_of_all_that_an_installation_brings_ultralytics_alone_has_a_licence_that_reaches_further(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from generated_pages import all_licences

    rows = [re.split(r" *\| *", line.strip("| \n")) for line in all_licences().splitlines()[2:]]
    licences = {canonicalize_name(name): licence for name, _, licence in rows}
    direct = {canonicalize_name(name) for name in requirements((ROOT / "requirements.txt").read_text().splitlines())}
    assert direct <= licences.keys() and "UNKNOWN" not in {licences[name] for name in direct}
    reach_further = {name for name, one in licences.items() if re.search(r"(?<!L)GPL|General Public", one)}
    lesser = {name for name in reach_further if re.search(r"LGPL|Lesser", licences[name])}
    assert {name.partition("-")[0] for name in reach_further - lesser} == {"ultralytics"}


def test_the_tests_environment_is_the_extra_test():
    assert (ROOT / "requirements-dev.txt").read_text().split() == ["-e", ".[test]"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    used = requirements(
        line for n in ("test", "audit", "hydra", "postgresql", "ray", "transfer", "wandb") for line in extras[n]
    )
    assert {"pytest", "pytest-xdist", "ruff", "import-linter", "setuptools", "packaging"} <= used.keys()

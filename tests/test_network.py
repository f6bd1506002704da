"""Promises about the network: a run and its answers connect to nobody but this machine, unless they are asked to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTE_ALL = """
import json, os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[-1]
        os.write(notes, (json.dumps([event, str(address)]) + "\\n").encode())

notes = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(note)
"""
TINY = ("image_size=16", "batch_size=16", "max_epochs=1", "search_epochs=1", "num_optuna_trials=1", "time_limit=null")
HERE = ("'127.0.0.1'", "127.0.0.1", "localhost", "'localhost'", "'::1'")


@pytest.fixture
def asked(tmp_path):
    """A function from a command to the addresses that it, and all that it starts, look up or connect to."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(NOTE_ALL)
    notes = tmp_path / "notes"

    def run(*command):
        notes.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": f"{tmp_path / 'hook'}{os.pathsep}{ROOT}", "NOTES": str(notes)}
            | {"TORCH_HOME": str(tmp_path / "empty")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert notes.exists(), "the hook was not there"
        return [address for _, address in map(json.loads, notes.read_text().splitlines())]

    return run


def elsewhere(addresses):
    return [one for one in addresses if not any(here in one for here in HERE) and not one.startswith("/")]


def test_the_hook_sees_who_is_asked(asked):
    ask = "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    code = f"import contextlib, socket\nwith contextlib.suppress(OSError): {ask}"  # there may be no way out of here
    assert elsewhere(asked("-c", code)) == ["('192.0.2.1', 9)"]


@pytest.mark.long
def test_a_run_with_all_trimmings_and_its_answers_ask_nobody(asked, tiny_npz):
    flags = ("--data", str(tiny_npz), "--quiet", *TINY, "use_pretrained=false", "model_type=yolo_inspired")
    assert elsewhere(asked(str(ROOT / "demo.py"), *flags)) == []
    assert elsewhere(asked(str(ROOT / "predict.py"), str(tiny_npz), "--report", "--monitor", "--quiet")) == []


@pytest.mark.long
def test_pretrained_weights_are_asked_of_their_own_hosts_alone(asked, tiny_npz):
    flags = ("--data", str(tiny_npz), "--quiet", *TINY, "--no-mlflow", "model_type=torchvision_resnet", "workers=1")
    hosts = {*elsewhere(asked(str(ROOT / "quick_start.py"), *flags, "enable_optuna=false"))}
    assert hosts and all("pytorch.org" in one for one in hosts), hosts

"""Lives of programs that do not work alone: a search with a worker that joined it, and a service with its callers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from programs import ROOT, TINY, start, wait
from whole import problems

STORAGE, TRIALS = "sqlite:///study.db", 6
LEADER = [
    str(ROOT / "run_experiment.py"), "--mode", "production", "--models", "lightning_cnn", "--epochs", "4", "--trials",
    str(TRIALS), *TINY, "search_epochs=2", "workers=1", "heartbeat=1", f"storage={STORAGE}",
]  # fmt: skip
WORKER = [
    "-m", "waferlab.search.workers", "--storage", STORAGE, "--model", "lightning_cnn", "--output-dir", "worker",
    "tracking_uri=sqlite:///mlflow.db",
]  # fmt: skip
PATIENCE = 600.0  # seconds that a life may take


def life_of_search(data: Path, folder: Path, seconds: float | None, draw: random.Random) -> dict[str, Any]:
    """A leader and a worker on one study; one of both is killed and started again, until all have ended.

    Args:
        data: what they train on.
        folder: where they work; emptied.
        seconds: that such a life takes where nobody is killed; None for that life itself.
        draw: says who is killed, and when.
    """
    _empty(folder)
    leader, log = [*LEADER[:1], "--data", str(data), *LEADER[1:]], folder / "log.txt"
    began, killed = time.monotonic(), []
    commands = {"leader": leader, "worker": [*WORKER, "--data", str(data)]}
    children = {name: start(command, folder, log) for name, command in commands.items()}
    ended: dict[str, int] = {}
    if seconds is not None:
        after = draw.uniform(0, seconds)
        _ends_within(children, ended, after)
        if alive := [name for name in children if name not in ended]:
            victim = draw.choice(alive)
            os.killpg(children[victim], signal.SIGKILL)
            wait(children[victim])
            killed.append(f"{victim} at {after:.2f}")
            again = [*leader, "--resume"] if victim == "leader" else commands["worker"]
            children[victim] = start(again, folder, log)
    _ends_within(children, ended, PATIENCE)
    found = [f"{name}: status {ended.get(name)}" for name in children if ended.get(name) != 0]
    if ended.get("leader") != 0:
        for child in children.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        found.append(log.read_text()[-800:])
    found += [*problems(folder), *_problems_of_study(folder)]
    return {"seconds": round(time.monotonic() - began, 1), "killed": killed, "problems": found}


def _ends_within(children: dict[str, int], ended: dict[str, int], seconds: float) -> None:
    """Waits until all have ended, no longer than so many seconds, and notes how they did."""
    until = time.monotonic() + seconds
    while len(ended) < len(children) and time.monotonic() < until:
        for name, child in children.items():
            if name not in ended and (status := wait(child, 0.0)) is not None:
                ended[name] = status
        time.sleep(0.01)


def _problems_of_study(folder: Path) -> list[str]:
    """As many trials as were asked for, none open, the winner's among them."""
    import optuna

    from waferlab.search.trials import counted_trials

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
        (name,) = optuna.get_all_study_names(storage)
        study = optuna.load_study(study_name=name, storage=storage)
    except Exception as error:
        return [f"the study: {type(error).__name__}: {error}"]
    found, counted = [], counted_trials(study)
    if len(counted) != TRIALS:
        found.append(f"{len(counted)} trials count, and not {TRIALS}")
    found += [f"trial {one.number} is {one.state.name}" for one in study.trials if not one.state.is_finished()]
    (summary,) = folder.glob("results/*/experiment_summary.json")
    (model,) = json.loads(summary.read_text())["models"]
    best = ((model.get("search") or {}).get("best") or {}).get("number")
    if best not in {one.number for one in counted}:
        found.append(f"the best trial, {best}, is none that counts")
    return found


def life_of_service(model: Path, folder: Path, seconds: float | None, draw: random.Random) -> dict[str, Any]:
    """A service that is killed while somebody asks it, and is started again at once on the same port.

    All answers that came whole have to be the same, the second service has to answer, too, and SIGTERM has to end it
    with status 0 and leave no process.

    Args:
        model: what it answers with.
        folder: where it works; emptied.
        seconds: within so many it is killed after it began to answer; None to kill none.
        draw: says when.
    """
    _empty(folder)
    began, killed, found = time.monotonic(), [], []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(ROOT / "predict.py"), "--serve", "--port", str(port), "--model", str(model)]
    for turn in range(1 if seconds is None else 2):
        child = start(command, folder, folder / "log.txt")
        with _asked_all_the_time(port) as told:
            if not _until(lambda told=told: told["answers"], 60):
                found.append(f"no answer within 60 s: {(folder / 'log.txt').read_text()[-600:]}")
            if seconds is not None and turn == 0:
                after = draw.uniform(0, seconds)
                time.sleep(after)
                os.kill(child, signal.SIGKILL)
                wait(child)
                killed.append(f"service at {after:.2f}")
            else:
                os.kill(child, signal.SIGTERM)
                if (status := wait(child, 60)) != 0:
                    found.append(f"status {status} after SIGTERM")
        if len(told["answers"]) > 1:
            found.append(f"{len(told['answers'])} different answers to one question")
        found += told["wrong"]
        if not _until(lambda child=child: not _group_lives(child), 10):
            found.append("a process of the service lives on")
    found += problems(folder)
    return {"seconds": round(time.monotonic() - began, 1), "killed": killed, "problems": found}


@contextlib.contextmanager
def _asked_all_the_time(port: int) -> Iterator[dict[str, Any]]:
    """While the block runs, somebody asks; `answers` are those that came whole, `wrong` what no service may say."""
    told: dict[str, Any] = {"answers": set(), "wrong": []}
    enough = threading.Event()
    asker = threading.Thread(target=_ask, args=(port, told, enough))
    asker.start()
    try:
        yield told
    finally:
        enough.set()
        asker.join()


def _ask(port: int, told: dict[str, Any], enough: threading.Event) -> None:
    body = json.dumps({"maps": [[[0, 1, 0], [1, 2, 1]], [[1, 1, 2], [1, 2, 1]]]})
    while not enough.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):  # it is not there
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            status, said = answer.status, answer.read()
            if status == 200:
                told["answers"].add(json.dumps(json.loads(said)["answers"]))
            elif status != 503:  # it ends
                told["wrong"].append(f"status {status}: {said[:200]!r}")
        enough.wait(0.01)


def _until(holds: Any, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _group_lives(group: int) -> bool:
    from kills import alive_in

    return bool(alive_in(group))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

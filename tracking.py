"""Runs that can be trusted: a parent for the pipeline, a child for each model, a grandchild for each trial.

MLflow lives in a process of its own (`tracking_worker.py`), told what to do over a pipe, in order. So importing it and
making a fresh database take no time from training, and a server that is down costs a warning, not the training. A run
is closed with what became of it: FINISHED, FAILED or KILLED (pruned and interrupted ones, tagged with the reason). If
this program is killed, that process closes its runs; if the machine goes down, the next start does.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORE_WAIT = 60.0  # seconds that the end of a program, or one who needs an answer, waits for what is to be written
STOP_WAIT = 5.0  # seconds that the process has to close its runs and end
WORKER = Path(__file__).with_name("tracking_worker.py")


@dataclass
class TrackedRun:
    """A run that the tracker has, or soon will have, under a number of ours."""

    name: str
    number: int = 0
    closed: bool = False


class RegistryError(RuntimeError):
    """The registry cannot be asked or refused; what it holds is then not known."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model: its number, the aliases that name it, its tags."""

    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Champion:
    """The champion among the versions of a model.

    Attributes:
        version: its number.
        folder: with its files, if they could be had.
        problem: why not, or "".
    """

    version: str
    folder: Path
    problem: str = ""


class NoTracking:
    """What the pipeline talks to when tracking is off: takes every call and does nothing."""

    uri = None
    experiment_id = None
    broken = False

    def __getattr__(self, name: str) -> Callable[..., TrackedRun]:
        """Any method of `Tracking`."""
        return lambda *args, **kwargs: TrackedRun("")


class Tracking:
    """Writes the runs of one experiment.

    Args:
        experiment_name: MLflow experiment; made if it is not there.
        uri: tracking URI; None for `sqlite:///mlflow.db` in `folder`, with files in `mlruns/` beside it, so that a bare
            `mlflow ui` in that folder shows everything.
        folder: where the database and the files go.
        warn: called once, with one line, if the tracker cannot be used; the work goes on without it.
        resume: let runs go on that were opened with the same key.
        tracker: "mlflow", or "wandb" for offline runs of Weights & Biases in `folder`/wandb, without a registry.
    """

    def __init__(
        self,
        experiment_name: str,
        *,
        uri: str | None,
        folder: Path,
        warn: Callable[[str], None],
        resume: bool = False,
        tracker: str = "mlflow",
    ) -> None:
        folder = folder.resolve()
        self.tracker = tracker
        self.uri = (uri or f"sqlite:///{folder / 'mlflow.db'}") if tracker == "mlflow" else str(folder / "wandb")
        self.broken = False
        self._warn, self._open_runs, self._numbers = warn, [], itertools.count(1)
        self._worker: _Worker | None = None
        # A thread that does nothing but wait for the process, so that nobody else has to.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        try:
            self._worker = _take_worker(tracker)
        except OSError as error:
            self._break(f"its process cannot be started: {error}")
        self._opened = self._later(
            "open", uri=uri, folder=str(folder), experiment_name=experiment_name, process=this_process(), resume=resume
        )

    @property
    def experiment_id(self) -> str | None:
        """Of MLflow; waits until the store is open, and is None if it cannot be."""
        return self._wait(self._opened)

    # --- runs

    def start(
        self, name: str, *, parent: TrackedRun | None = None, tags: dict[str, str] | None = None, key: str | None = None
    ) -> TrackedRun:
        """Opens a run below `parent`, or on top; when resuming, the one that was opened with the same `key` goes on."""
        run = TrackedRun(name, next(self._numbers))
        self._open_runs.append(run)
        above = None if parent is None else parent.number
        self._later("start", run=run.number, name=name, parent=above, tags=tags or {}, key=key, started=_now())
        return run

    def end(self, run: TrackedRun, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """Closes a run as FINISHED, FAILED or KILLED; `reason` becomes a tag."""
        run.closed = True
        self._later("end", run=run.number, status=status, reason=reason, ended=_now())

    def params(self, run: TrackedRun, **params: Any) -> None:
        """Logs parameters."""
        self._later("params", run=run.number, params={name: str(value) for name, value in params.items()})

    def tags(self, run: TrackedRun, **tags: str) -> None:
        """Sets tags."""
        self._later("tags", run=run.number, tags={name: str(value) for name, value in tags.items()})

    def note(self, run: TrackedRun, markdown: str) -> None:
        """What the run's page shows on top."""
        self._later("note", run=run.number, markdown=markdown)

    def metrics(self, run: TrackedRun, values: dict[str, float], *, step: int = 0) -> None:
        """Logs metrics of one step, with the time of now."""
        numbers = {name: float(value) for name, value in values.items()}
        self._later("metrics", run=run.number, values=numbers, step=step, logged=_now())

    def files(self, run: TrackedRun, files: Sequence[Path], *, folder: str | None = None) -> None:
        """Copies files to the run's artifacts."""
        self._later("files", run=run.number, files=[str(file.resolve()) for file in files], folder=folder)

    def dataset(self, run: TrackedRun, *, name: str, digest: str, source: str, profile: str) -> None:
        """Names the data and the split; `digest` is the split's fingerprint."""
        self._later("dataset", run=run.number, name=name, digest=digest, source=source, profile=profile)

    def watch_system(self, run: TrackedRun) -> None:
        """Logs the machine's load and memory to a run, every five seconds, until `close`."""
        self._later("watch_system", run=run.number)

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a registered model, oldest first; none if there is no such model.

        Raises:
            RegistryError: the registry cannot be asked.
        """
        found = self._ask_registry("versions", name=name)
        return [ModelVersion(one["version"], tuple(one["aliases"]), one["tags"]) for one in found]

    def champion(self, name: str, *, into: Path) -> Champion | None:
        """The version that `models:/name@champion` names; None if the registry says that there is none.

        Args:
            name: of the registered model.
            into: an empty folder, to which the version's files are copied.

        Raises:
            RegistryError: the registry cannot be asked, so nobody knows whether there is a champion.
        """
        found = self._ask_registry("champion", name=name, into=str(into.resolve()))
        return None if found is None else Champion(found["version"], into, found["problem"])

    def register(
        self,
        run: TrackedRun,
        file: Path,
        *,
        name: str,
        about: str,
        alias: str,
        description: str,
        tags: Mapping[str, str] | None = None,
        beside: Sequence[Path] = (),
        example: Any,
        classes: int,
    ) -> str:
        """Registers an ONNX file as the next version of a model, under an alias, and returns the version.

        Args:
            run: that the file comes from; it must be open.
            file: to register.
            name: of the registered model.
            about: what it does, in Markdown, for its page.
            alias: "champion" or "challenger".
            description: of the version, in Markdown.
            tags: of the version.
            beside: files that the version keeps in its folder `extra_files`.
            example: input, uint8 [N, rows, columns].
            classes: columns of the output.

        Raises:
            RegistryError: the registry cannot be used, or refused.
        """
        return self._ask_registry(
            "register", run=run.number, file=str(file.resolve()), name=name, about=about, alias=alias,
            description=description, tags=dict(tags or {}), beside=[str(one.resolve()) for one in beside],
            example=example.tolist(), classes=classes,
        )  # fmt: skip

    def _ask_registry(self, do: str, **arguments: Any) -> Any:
        if self.tracker != "mlflow":
            raise RegistryError("offline runs of Weights & Biases have no registry")
        answer = self._wait(self._later(do, **arguments))
        if answer is None:
            raise RegistryError("MLflow could not be used; a warning said why")
        if "error" in answer:
            raise RegistryError(answer["error"])
        return answer["answer"]

    def close(self, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """Closes all open runs, innermost first, waits until everything is written and ends the process."""
        try:
            for run in reversed([run for run in self._open_runs if not run.closed]):
                self.end(run, status, reason=reason)
            self._wait(self._later("finish", reason="it was not closed"))
        finally:
            if self._worker is not None:
                self._worker.stop()
            self._thread.shutdown(wait=False, cancel_futures=True)

    # --- the process

    def _later(self, do: str, **arguments: Any) -> Future:
        """Has a command carried out after all before it; the future holds the answer, or None if tracking broke."""

        def ask() -> Any:
            if self.broken:
                return None
            try:
                return self._worker.ask(do, **arguments)
            except WorkerError as error:
                self._break(str(error))

        return self._thread.submit(ask)

    def _wait(self, answer: Future) -> Any:
        if self.broken:
            return None
        try:
            return answer.result(timeout=STORE_WAIT)
        except TimeoutError:
            self._break(f"it did not take everything within {STORE_WAIT:g} s")

    def _break(self, reason: str) -> None:
        if not self.broken:
            self.broken = True
            name = {"mlflow": "MLflow", "wandb": "Weights & Biases"}[self.tracker]
            self._warn(f"warning: goes on without {name} at {self.uri} ({reason})")


class WorkerError(RuntimeError):
    """The process reported an error, or is gone."""


class _Worker:
    """The process that tracks: takes a command a line and answers each with a line.

    In a session of its own, so that Ctrl-C reaches this program alone, which then says what shall become of the runs.
    """

    def __init__(self, tracker: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, WORKER, tracker], text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._unanswered = 0
        atexit.register(self.stop)

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends a command and does not wait for its answer."""
        self._unanswered += 1
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a command and returns its answer.

        Raises:
            WorkerError: this command, or one that was told before, failed.
        """
        with contextlib.suppress(OSError):  # if it is gone, its last words are still to be read
            self.tell(do, **arguments)
        while self._unanswered:
            line = self._process.stdout.readline()
            if not line.endswith("\n"):
                raise WorkerError(f"its process ended with status {self._process.wait()}")
            self._unanswered -= 1
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(answer["error"])
        return answer["result"]

    def stop(self) -> None:
        """Ends the process; it closes runs that are still open."""
        atexit.unregister(self.stop)
        for end in (self._process.terminate, self._process.kill):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_WAIT)
                break
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


_early: list[_Worker] = []


def start_early(folder: Path) -> None:
    """Starts the process for MLflow, which the next `Tracking` takes, before a program's own imports.

    Its imports, and a fresh database if `folder` has none, are then made on a core that would idle.
    """
    with contextlib.suppress(OSError):  # `Tracking` will say so
        worker = _Worker("mlflow")
        _early.append(worker)
        worker.tell("prepare", folder=str(folder.resolve()))


def _take_worker(tracker: str) -> _Worker:
    return _early.pop() if tracker == "mlflow" and _early else _Worker(tracker)


class MlflowServer:
    """`mlflow ui` on 127.0.0.1 in a process group of its own, stopped as a whole.

    Args:
        uri: the store that it shows; it must exist, since several processes making a fresh database get in each
            other's way.
        port: tried first; the next free one is taken.

    Raises:
        ServerError: it did not come up within a minute.
    """

    def __init__(self, uri: str, *, port: int = 5000) -> None:
        self.port = _free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        # One worker and no job processes: half the start-up time, a tenth of the memory, and nothing left behind.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1",
             "--port", str(self.port), "--workers", "1"],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_until_up(self, seconds: float = 60.0) -> None:
        """Returns as soon as the server answers."""
        from urllib.error import URLError
        from urllib.request import urlopen

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urlopen(f"{self.url}/health", timeout=2):
                    return
            except (URLError, OSError):
                time.sleep(0.2)
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        self.stop()
        raise ServerError(f"The MLflow server did not start on {self.url}: {' '.join(last) or 'no answer'}")

    def link(self, experiment_id: str) -> str:
        """The page with the experiment's runs."""
        return f"{self.url}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"

    def stop(self) -> None:
        """Ends the server and all processes that it started."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_WAIT)
        self._log.close()


class ServerError(RuntimeError):
    """The MLflow server could not be started."""


def _free_port(first: int) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given back is free
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"No free port from {first} to {first + 99}. Stop a server that runs there.")


def _now() -> int:
    """Milliseconds since 1970: when something happened, not when the process came to it."""
    return int(time.time() * 1000)


def this_process() -> str:
    """Host, process number and start time: a number alone may belong to another process tomorrow."""
    import psutil

    return f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.0f}"


def still_runs(process: str) -> bool:
    """Whether a process that `this_process` named may still run; of other hosts one cannot know, so it may."""
    import psutil

    host, number, started = process.rsplit(" ", 2)
    if host != platform.node():
        return True
    try:
        return f"{psutil.Process(int(number)).create_time():.0f}" == started
    except psutil.NoSuchProcess:
        return False

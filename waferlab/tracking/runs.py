"""Runs that can be trusted: a parent for the pipeline, a child for each model, a grandchild for each trial.

MLflow lives in a process of its own (`worker.py`), told what to do over a pipe, in order. So importing it and
making a fresh database take no time from training. While the store is away, what is to be written waits in line until
it is back; if it stays away, that costs a warning, not the training. A run is closed with what became of it: FINISHED,
FAILED or KILLED (pruned and interrupted ones, tagged with the reason). If this program is killed, that process closes
its runs; if the machine goes down, the next start does.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from waferlab.errors import RegistryError
from waferlab.tracking.processes import this_process

STORE_WAIT = 60.0  # seconds that the end of a program, or one who needs an answer, waits for what is to be written
OUTAGE = 30.0  # seconds of failed tries after which nobody waits for the store any longer
FIRST_PAUSE = 0.5  # seconds before the second try; each further pause is twice as long, up to OUTAGE
ASKED = ("versions", "champion", "register")  # commands of the registry
STOP_WAIT = 5.0  # seconds that a process has to close what it has open and end
WORKER = (sys.executable, "-m", "waferlab.tracking.worker")
PATHS = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])


@dataclass
class TrackedRun:
    """A run that the tracker has, or soon will have, under a number of ours."""

    name: str
    number: int = 0
    closed: bool = False


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
    closed = True

    def __getattr__(self, name: str) -> Callable[..., TrackedRun]:
        """Any method of `Tracking`."""
        return lambda *args, **kwargs: TrackedRun("")


class Tracking:
    """Writes the runs of one experiment.

    What fails because the store is away is tried again, and all that comes after it waits in line. What the store
    refuses is left out, and the rest goes on.

    Attributes:
        uri: where the runs are.
        broken: an answer could not be had, so no other is waited for.
        closed: `close` was called; to go on, make another.

    Args:
        experiment_name: MLflow experiment; made if it is not there.
        uri: tracking URI; None for `sqlite:///mlflow.db` in `folder`, with files in `mlruns/` beside it, so that a bare
            `mlflow ui` in that folder shows everything.
        folder: where the database and the files go.
        warn: called with a line at the first trouble, and if the store stays away until the end; from another thread.
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
        self.broken = self.closed = False
        self._print, self._open_runs, self._numbers = warn, [], itertools.count(1)
        self._warned_of: Exception | None = None
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._given: float = time.time()  # when we were told what is being carried out
        self._failing_since: float | None = None
        self._given_up = self._somebody_waits = False
        self._try_now = threading.Event()
        self._worker: _Worker | None = None
        try:
            self._worker = _take_worker(tracker)
        except OSError as error:
            self._give_up(WorkerError(f"its process cannot be started: {error}"))
        # A thread that does nothing but wait for the process, so that nobody else has to.
        self._thread = threading.Thread(target=self._carry_out_all, name="tracking", daemon=True)
        self._thread.start()
        atexit.register(self.close, "KILLED", reason="it was not closed")
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
        """Logs parameters; one that a run which goes on has with another value becomes a tag: it cannot be changed."""
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
        try:
            found = None if self.broken else self._result(self._later(do, **arguments))
        except CommandError as error:  # this one cannot be had; the rest goes on
            raise RegistryError(str(error)) from error
        if self.broken:
            raise RegistryError("MLflow could not be used; a warning said why")
        return found

    def close(self, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """Closes all open runs, innermost first, waits until everything is written and ends the process."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        try:
            for run in reversed([run for run in self._open_runs if not run.closed]):
                self.end(run, status, reason=reason)
            self._answer(self._later("finish", reason="it was not closed"))
        finally:
            self._given_up = True
            self._try_now.set()
            self._commands.put(None)
            if self._worker is not None:
                self._worker.stop()
            self._thread.join(STOP_WAIT)

    # --- the line of commands

    def _later(self, do: str, **arguments: Any) -> Future:
        """Has a command carried out after all before it; the future holds the answer, or None if tracking broke."""
        command = _Command(do, arguments, time.time(), Future())
        if self._given_up:
            command.answer.set_result(None)
        else:
            self._commands.put(command)
        return command.answer

    def _carry_out_all(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                command.answer.set_result(self._carry_out(command))
            except Exception as error:  # for whoever waits for the answer
                command.answer.set_exception(error)

    def _carry_out(self, command: _Command) -> Any:
        """Tries until the store takes a command; those after it wait.

        Raises:
            CommandError: the store refuses it, or has failed to take anything for `OUTAGE` although it answers.
        """
        pause = FIRST_PAUSE
        while not self._given_up:
            self._given = command.given
            try:
                answer = self._worker.ask(command.do, **command.arguments)
            except WorkerError as error:
                return self._give_up(error)
            except CommandError as error:
                if not error.may_pass and command.do == "open":  # without it, nothing else can be done
                    return self._give_up(error)
                if not error.may_pass and command.do in ASKED:  # whoever asks is told
                    raise
                if not error.may_pass:
                    self._failing_since = None
                    self._warn_once(f"{self._store} did not take {command.do} ({error}); the rest goes on", error)
                    raise
                self._failing_since = self._failing_since or time.monotonic()
                left = self._failing_since + OUTAGE - time.monotonic()
                if left <= 0:
                    if error.store_is_away and self._somebody_waits:
                        return self._give_up(error)
                    self._warn_once(f"goes on without {self._store} until it takes what waits ({error})", error)
                    if not error.store_is_away:
                        raise
                self._try_now.wait(pause if left <= 0 else min(pause, left))
                self._try_now.clear()
                pause = min(2 * pause, OUTAGE)
            else:
                self._failing_since = None
                for remark in answer["remarks"]:
                    self._warn(remark)
                return answer["result"]
        return None

    def _wait(self, answer: Future) -> Any:
        """An answer, or None if it cannot be had; then no other is waited for."""
        return None if self.broken else self._answer(answer)

    def _answer(self, answer: Future) -> Any:
        try:
            return self._result(answer)
        except CommandError as error:
            self.broken = True
            if error is not self._warned_of:
                self._warn(f"warning: no answer from {self._store} ({error})")

    def _result(self, answer: Future) -> Any:
        self._somebody_waits = True
        self._try_now.set()
        try:
            return answer.result(timeout=STORE_WAIT)
        except TimeoutError:
            self._give_up(WorkerError(f"it did not take everything within {STORE_WAIT:g} s"))
        finally:
            self._somebody_waits = False

    def _give_up(self, error: Exception) -> None:
        """Nothing is carried out any more, and nobody waits."""
        if not self._given_up:
            self._given_up = self.broken = True
            if not self._warn_once(f"goes on without {self._store} ({error})", error):
                since = time.strftime("%H:%M:%S", time.localtime(self._given))
                self._warn(f"warning: nothing from {since} on was written to {self._store} ({error})")

    def _warn(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._print(line)

    def _warn_once(self, line: str, error: Exception) -> bool:
        first = self._warned_of is None
        if first:
            self._warned_of = error
            self._warn(f"warning: {line}")
        return first

    @property
    def _store(self) -> str:
        return f"{'MLflow' if self.tracker == 'mlflow' else 'Weights & Biases'} at {self.uri}"


class _Command(NamedTuple):
    do: str
    arguments: dict[str, Any]
    given: float
    answer: Future


class CommandError(RuntimeError):
    """The process could not carry out a command.

    Attributes:
        may_pass: a later try may succeed.
        store_is_away: nothing else would have succeeded either.
    """

    def __init__(self, reason: str, *, may_pass: bool, store_is_away: bool) -> None:
        super().__init__(reason)
        self.may_pass, self.store_is_away = may_pass, store_is_away


class WorkerError(RuntimeError):
    """The process cannot be started, is gone, or hangs."""


class _Worker:
    """The process that tracks: takes a command a line and answers each with a line.

    In a session of its own, so that Ctrl-C reaches this program alone, which then says what shall become of the runs.
    """

    def __init__(self, tracker: str) -> None:
        self._process = subprocess.Popen(
            [*WORKER, tracker], env=os.environ | {"PYTHONPATH": PATHS}, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._unanswered = 0
        atexit.register(self.stop)

    def tell(self, do: str, **arguments: Any) -> None:
        """Sends a command and does not wait for its answer."""
        line = json.dumps({"do": do, **arguments})
        self._unanswered += 1
        print(line, file=self._process.stdin, flush=True)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and returns its answer: the result and remarks for the user.

        Raises:
            CommandError: it failed.
            WorkerError: the process is gone.
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
            raise CommandError(answer.pop("error"), **answer)
        return answer

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


def _now() -> int:
    """Milliseconds since 1970: when something happened, not when the process came to it."""
    return int(time.time() * 1000)


Run = TrackedRun


class NoRuns(NoTracking):
    def logger(self, run):
        return False

    @contextlib.contextmanager
    def closing(self):
        yield self


class RunTree(Tracking):
    pass

"""Work that processes of one thread each do side by side, and what they tell the one that started them.

Two trainings with one thread each get more done than one after the other with two: small steps leave a second thread
waiting, and beside any other busy program it waits nearly always. The processes are forked, so they have the maps, the
models and whatever a user's script has registered, at once and without a copy; but no threads, so trackers, terminal
and database connections stay behind: what is to be printed or tracked is told to this process, which does it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from waferlab.terminal import Terminal
from waferlab.tracking.runs import Run
from waferlab.training.progress import Bars, ToldProgress

if TYPE_CHECKING:
    from waferlab.tracking.runs import NoRuns, RunTree

Tell = Callable[..., None]
LAST_WORDS = 20.0  # seconds that processes have to end when they are interrupted


def side_by_side(work: Callable[[int, Tell], None], *, workers: int, hear: Callable[..., None]) -> None:
    """Runs `work(number, tell)` in so many processes and hands what they tell to `hear(number, what, *content)`.

    What becomes of a process that was killed is heard as "killed", with how in words; the others go on.

    Raises:
        What `work` raised, of the first that did; the others are interrupted.
        KeyboardInterrupt: this process was interrupted, and has interrupted the others, which have ended.
    """
    crew: Crew = []
    try:
        for number in range(workers):
            crew.append(_start(work, number))
        _hear_out(crew, hear)
    except BaseException:
        for process, _ in crew:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        _hear_out(crew, hear, until=time.monotonic() + LAST_WORDS, raises=False)
        raise
    finally:
        for process, _ in crew:
            process.kill()
            process.join()


Crew = list[tuple[BaseProcess, Connection]]


def _start(work: Callable[[int, Tell], None], number: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, number, theirs, os.getpid()), daemon=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # one that comes before the work begins would be lost
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    theirs.close()
    return process, ours


def _work(work: Callable[[int, Tell], None], number: int, connection: Connection, parent: int) -> None:
    """What a forked process does; Ctrl-C in the terminal reaches only the one that forked it, which passes it on."""
    os.setpgrp()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)

    def tell(what: str, *content: Any) -> None:
        connection.send((what, *content))

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background may ignore it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work(number, tell)
    except BaseException as error:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what it raised is on its way
        tell("raised", _as_it_can_be_sent(error))


def _end_with(parent: int) -> None:
    """Nobody works for a program that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _as_it_can_be_sent(error: BaseException) -> BaseException:
    """The error, or its words where it cannot be made again from what it holds; it never leaves these processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _hear_out(crew: Crew, hear: Callable[..., None], *, until: float | None = None, raises: bool = True) -> None:
    """Until all have ended, or have been heard for long enough."""
    talking = {connection: (number, process) for number, (process, connection) in enumerate(crew)}
    while talking and (until is None or time.monotonic() < until):
        for connection in wait(list(talking), timeout=0.5):
            number, process = talking[connection]
            try:
                what, *content = connection.recv()
            except EOFError:
                del talking[connection]
                process.join()
                if process.exitcode:
                    hear(number, "killed", how_it_ended(process.exitcode))
                continue
            if what != "raised":
                hear(number, what, *content)
            elif raises:
                raise content[0]


def how_it_ended(status: int) -> str:
    """In words, of a process that did not end by itself."""
    if status == -signal.SIGKILL:
        return "its process was killed, most likely because the memory did not suffice for as many trials side by side"
    return f"its process ended with {signal.Signals(-status).name if status < 0 else f'status {status}'}"


# ------------------------------------------------------------------------------------------- what stays with the parent


class ToldRuns:
    """A worker's side of a tree of runs: has those methods of `RunTree` that a trial needs, and tells of each call."""

    broken = closed = False

    def __init__(self, tree: RunTree, tell: Tell) -> None:
        self.uri, self.store, self._tell = tree.uri, tree.store, tell

    def start(self, name: str, *, parent: Run | None = None, **more: Any) -> Run:
        """See `RunTree.start`."""
        run = Run(name)
        self._tell("run", "start", run, {"parent": parent, **more})
        return run

    def end(self, run: Run, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """See `RunTree.end`."""
        self._tell("run", "end", run, {"status": status, "reason": reason})

    def params(self, run: Run, /, **params: Any) -> None:
        """See `RunTree.params`."""
        self._tell("run", "params", run, params)

    def tags(self, run: Run, /, **tags: Any) -> None:
        """See `RunTree.tags`."""
        self._tell("run", "tags", run, tags)

    def metrics(self, run: Run, values: Mapping[str, float], *, step: int = 0) -> None:
        """See `RunTree.metrics`."""
        self._tell("run", "metrics", run, {"values": values, "step": step})

    def logger(self, run: Run) -> Any:
        """See `RunTree.logger`."""
        from waferlab.tracking.loggers import RunLogger

        return RunLogger(self, run)

    def run_id(self, run: Run) -> None:
        """Nobody here knows it."""


class Listener:
    """The other side: prints and tracks what workers tell, and ends what one that was killed has left open.

    Args:
        tree: of runs.
        above: the run that theirs are below.
        terminal: to print on.
        lost: called with the process number of a worker that was killed, and how, in words.
    """

    def __init__(
        self, tree: RunTree | NoRuns, above: Run | None, terminal: Terminal, *,
        lost: Callable[[str], None] = lambda how: None,
    ) -> None:  # fmt: skip
        self._tree, self._runs, self._terminal = tree, {above.token: above} if above else {}, terminal
        self._open: dict[int, set[str]] = {}
        self._lost, self._bars = lost, Bars(terminal.console)

    def hear(self, worker: int, what: str, *content: Any) -> None:
        """What a worker tells."""
        match what:
            case "say":
                self._terminal.say(content[0], style=content[1])
            case "warn":
                self._terminal.warn(*content)
            case "bar":
                self._bars.update(*content)
            case "run":
                self._call(worker, *content)
            case "killed":
                for token in self._open.pop(worker, set()):
                    self._tree.end(self._runs[token], "KILLED", reason=content[0])
                self._lost(content[0])

    def _call(self, worker: int, method: str, run: Run, content: dict[str, Any]) -> None:
        if method == "start":
            parent = content.pop("parent")
            above = None if parent is None else self._runs[parent.token]
            self._runs[run.token] = self._tree.start(run.name, parent=above, **content)
            self._open.setdefault(worker, set()).add(run.token)
            return
        getattr(self._tree, method)(self._runs[run.token], **content)
        if method == "end":
            self._open[worker].discard(run.token)


class ToldTerminal(Terminal):
    """A worker's side of a terminal: what it would print is told."""

    def __init__(self, terminal: Terminal, tell: Tell) -> None:
        super().__init__(Console(quiet=True), quiet=True)
        self._tell, self._watched = tell, terminal.somebody_watches()

    def say(self, text: str, *, style: str | None = None) -> None:
        """Tells a line."""
        self._tell("say", text, style)

    def progress(self, title: str) -> ToldProgress | None:
        """A bar is drawn by the other process, if somebody watches."""
        return ToldProgress(title, partial(self._tell, "bar")) if self._watched else None

    def warn(self, text: str) -> None:
        """Tells a warning."""
        self._tell("warn", text)

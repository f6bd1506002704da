"""What stays with the program when it has forked: runs and the terminal. The other processes tell it what they want."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from waferlab.terminal import Terminal
from waferlab.tracking.runs import Run
from waferlab.training.progress import Bars, ToldProgress
from waferlab.training.side_by_side import Tell

if TYPE_CHECKING:
    from waferlab.tracking.runs import NoRuns, RunTree


class ToldRuns:
    """A worker's side of a tree of runs: has those methods of `RunTree` that a trial needs, and tells of each call."""

    broken = closed = False
    experiment_id = None  # nobody here knows it

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
        self._titles: dict[int, set[str]] = {}  # of the bars of each worker

    def hear(self, worker: int, what: str, *content: Any) -> None:
        """What a worker tells."""
        match what:
            case "say":
                self._terminal.say(content[0], style=content[1])
            case "warn":
                self._terminal.warn(*content)
            case "bar":
                self._titles.setdefault(worker, set()).add(content[0])
                self._bars.update(*content)
            case "run":
                self._call(worker, *content)
            case "killed":
                for token in self._open.pop(worker, set()):
                    self._tree.end(self._runs[token], "KILLED", reason=content[0])
                for title in self._titles.pop(worker, set()):
                    self._bars.remove(title)
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

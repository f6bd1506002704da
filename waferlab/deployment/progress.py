"""How far a long list of maps is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

SECONDS_BETWEEN_LINES = 15  # in a log, which nobody watches


@contextmanager
def counting(console: Console, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of maps that are done: a bar on a terminal, else a line now and then."""
    if quiet:
        yield lambda done: None
    elif not console.is_terminal:
        yield _Lines(console, total)
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        rate = TextColumn("{task.fields[rate]}")
        with Progress(
            TextColumn("  maps"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=console,
            transient=True,
        ) as progress:  # fmt: skip
            task, started = progress.add_task("maps", total=total, rate=""), time.monotonic()

            def done(number: int) -> None:
                progress.update(task, completed=number, rate=f"{_rate(number, started):,.0f} maps/s")

            yield done


def _rate(number: int, started: float) -> float:
    return number / max(time.monotonic() - started, 1e-9)


class _Lines:
    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._started = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last, rate = time.monotonic(), _rate(done, self._started)
        left = (self._total - done) / rate if rate else 0.0
        text = f"  {done:,} of {self._total:,} maps, {rate:,.0f} maps/s, {left:,.0f} s left"
        self._console.print(text, soft_wrap=True, markup=False)

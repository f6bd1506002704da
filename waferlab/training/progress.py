"""How far a training is."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress


class Bars:
    """One bar for each of several trainings at a time, with the time left; for a terminal.

    Args:
        console: where they are drawn.
    """

    def __init__(self, console: Console) -> None:
        self._progress, self._tasks = make_bars(console), {}

    def update(self, title: str, done: float, text: str) -> None:
        """Moves the bar of a training to its share `done`, 0..1; at 1 it is taken away, and with the last all are."""
        if done >= 1:
            self.remove(title)
            return
        if not self._tasks:
            self._progress.start()
        if title not in self._tasks:
            self._tasks[title] = self._progress.add_task(text, total=1.0)
        self._progress.update(self._tasks[title], completed=done, description=text)

    def remove(self, title: str) -> None:
        """Takes one bar away, if it is there."""
        if title in self._tasks:
            self._progress.remove_task(self._tasks.pop(title))
            if not self._tasks:
                self._progress.stop()


class ToldProgress(pl.Callback):
    """Tells another process how far a training is, a few times a second.

    Args:
        title: of the training.
        tell: called with the title, the share that is done, and a text.
    """

    EVERY = 0.25  # seconds

    def __init__(self, title: str, tell: Callable[[str, float, str], None]) -> None:
        self._title, self._tell, self._told = title, tell, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Tells it, unless it did just now."""
        if time.monotonic() - self._told > self.EVERY:
            self._told = time.monotonic()
            self._tell(self._title, *how_far(trainer, pl_module, self._title))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """It is over."""
        self._tell(self._title, 1.0, "")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """It is over, as a trial that is pruned."""
        self._tell(self._title, 1.0, "")


def how_far(trainer: pl.Trainer, model: pl.LightningModule, title: str) -> tuple[float, str]:
    """The share of the steps or of the time that is used, whichever is more, and a text for the bar."""
    done = max(trainer.global_step / max(1, trainer.estimated_stepping_batches), model.time_progress)
    best = trainer.callback_metrics.get("val_macro_f1")
    text = f"{title}  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
    return done, text if best is None else f"{text}  val macro F1 {best:.3f}"


def make_bars(console: Console) -> Progress:
    """As all bars of a training look; gone when they end."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("  {task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


class ProgressBar(pl.Callback):
    """One bar for a whole training, with the time left; drawn on a terminal only."""

    def __init__(self, console: Console, title: str) -> None:
        self._progress = make_bars(console)
        self._title = title

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the empty bar."""
        self._task = self._progress.add_task(self._title, total=1.0)
        self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Moves the bar to the share of the steps or of the time that is used, whichever is more."""
        done, text = how_far(trainer, pl_module, self._title)
        self._progress.update(self._task, completed=done, description=text)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the bar away."""
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Takes the bar away before an error is printed."""
        with suppress(OSError):  # the terminal is gone, which may be the reason why it ends
            self._progress.stop()

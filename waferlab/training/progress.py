"""How far a training is."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from rich.console import Console


class ProgressBar(pl.Callback):
    """One bar for a whole training, with the time left; drawn on a terminal only."""

    def __init__(self, console: Console, title: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("  {task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._title = title

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the empty bar."""
        self._task = self._progress.add_task(self._title, total=1.0)
        self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Moves the bar to the share of the steps or of the time that is used, whichever is more."""
        done = max(trainer.global_step / max(1, trainer.estimated_stepping_batches), pl_module.time_progress)
        best = trainer.callback_metrics.get("val_macro_f1")
        text = f"{self._title}  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._progress.update(
            self._task, completed=done, description=text if best is None else f"{text}  val macro F1 {best:.3f}"
        )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the bar away."""
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Takes the bar away before an error is printed."""
        self._progress.stop()

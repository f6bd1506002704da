"""What happens around a training: time budget, history, Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np

from waferlab.errors import TrainingDivergedError


class TimeBudget(pl.Callback):
    """Ends training when its seconds are used up, with the learning rate annealed to zero by then.

    The share of the time used is handed to the model, whose schedule follows whichever is further: steps or time.
    What a cut-off run had used is in the resume checkpoint.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.used_before = seconds, 0.0
        self._started = time.monotonic()

    def used(self) -> float:
        """Seconds of training so far, over all sittings."""
        return self.used_before + time.monotonic() - self._started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Tells the schedule how much of the time is gone; when all is, this batch is the last."""
        pl_module.time_progress = min(1.0, self.used() / self.seconds)
        if self.used() >= self.seconds:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        """Seconds used, kept in checkpoints."""
        return {"used": self.used()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up the clock of the run that is resumed."""
        self.used_before = state["used"]


class KeepInterrupt(pl.Callback):
    """Sees to it that every Ctrl-C stops the training.

    Python drops an exception that is raised while a destructor or a callback of compiled code runs; so the signal is
    also noted, and raised again at the next batch.
    """

    def __init__(self) -> None:
        self._noted = False
        self._handler_before: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the signal; only the main thread of a program may."""
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGINT, self._note_and_raise)

    def _note_and_raise(self, *_: object) -> None:
        self._noted = True
        raise KeyboardInterrupt

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Raises what was swallowed."""
        if self._noted:
            raise KeyboardInterrupt

    def give_back(self) -> None:
        """Restores the signal's handler, which Lightning sets to be ignored after an interrupt."""
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)


class History(pl.Callback):
    """Keeps the metrics of each epoch for the curves.

    Args:
        say: prints a line an epoch; None where a bar shows the progress.
    """

    KEYS = ("train_loss", "val_loss", "train_macro_f1", "val_macro_f1", "train_accuracy", "val_accuracy")

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.epochs: list[dict[str, float]] = []
        self.seconds_before = 0.0
        self._started, self._say = time.monotonic(), say

    def seconds(self) -> float:
        """Seconds of training, validation included, over all sittings."""
        return self.seconds_before + time.monotonic() - self._started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Appends the epoch; runs before the checkpoints are written, so a resumed run has it too."""
        values = {key: float(trainer.callback_metrics[key]) for key in self.KEYS if key in trainer.callback_metrics}
        if not np.isfinite(values["train_loss"]):
            raise TrainingDivergedError(
                f"the training loss is {values['train_loss']} after epoch {trainer.current_epoch + 1}. "
                f"Lower the learning rate (now {pl_module.learning_rate:g}) or set precision='32-true'."
            )
        self.epochs.append({"epoch": trainer.current_epoch + 1, **values})
        if self._say:
            left = (trainer.max_epochs - trainer.current_epoch - 1) * self.seconds() / len(self.epochs)
            limit = next((c for c in trainer.callbacks if isinstance(c, TimeBudget)), None)
            left = min(left, limit.seconds - limit.used()) if limit else left
            self._say(
                f"  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  "
                f"val macro F1 {values.get('val_macro_f1', 0):.3f}  train loss {values.get('train_loss', 0):.3f}  "
                f"at most {max(0.0, left):.0f} s left"
            )

    def state_dict(self) -> dict[str, Any]:
        """Epochs and seconds so far, kept in checkpoints."""
        return {"epochs": self.epochs, "seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the record of the run that is resumed."""
        self.epochs, self.seconds_before = state["epochs"], state["seconds"]

    def series(self) -> dict[str, list[float]]:
        """{"epoch": [...], "train_loss": [...], ...} for the curves."""
        return {
            key: [e[key] for e in self.epochs] for key in ("epoch", *self.KEYS) if all(key in e for e in self.epochs)
        }

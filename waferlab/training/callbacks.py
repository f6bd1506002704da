"""What happens around a training: time budget, history, Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping

from waferlab.errors import ConfigError, TrainingDivergedError
from waferlab.training.devices import from_first

DEVICES_APART = 1_000_003  # seeds of the devices of a training; more than it has epochs


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
        pl_module.time_progress = min(1.0, from_first(self.used()) / self.seconds)
        if pl_module.time_progress >= 1.0:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        """Seconds used, kept in checkpoints."""
        return {"used": self.used()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up the clock of the run that is resumed."""
        self.used_before = state["used"]


class Patience(EarlyStopping):
    """Ends a training that gets no better; while its learning rate is still at the peak, by letting it fall first.

    The fall has the share of the training that it would have had at its planned end.

    Args:
        epochs: that may pass without a better score.
        best: the score so far of a training that is gone on with, 0..1.
    """

    def __init__(self, epochs: int, *, best: float | None = None) -> None:
        super().__init__("val_macro_f1", mode="max", patience=epochs)
        self._last_epoch = 0
        if best is not None:
            self.best_score = torch.tensor(best)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the earlier end of a run that is resumed; the model's own hook, which plans by it, comes after."""
        if self._last_epoch:
            trainer.fit_loop.max_epochs = self._last_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the epochs without a better score."""
        stopped_before, level = trainer.should_stop, 1 - pl_module.decay
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.should_stop and not stopped_before and pl_module.progress(trainer.global_step) < level:
            trainer.should_stop, self.wait_count, epochs = False, 0, trainer.current_epoch + 1
            trainer.fit_loop.max_epochs = self._last_epoch = math.ceil(epochs / level)
            pl_module.plan_schedule(epochs_done=epochs)

    def state_dict(self) -> dict[str, Any]:
        """Kept in checkpoints."""
        return super().state_dict() | {"last_epoch": self._last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the count of the run that is resumed."""
        super().load_state_dict(state)
        self._last_epoch = state["last_epoch"]


class SeedEachEpoch(pl.Callback):
    """Seeds each epoch by its number: a resumed run draws the same augmentation and dropout as an unbroken one."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the seed that the run was started with."""
        self._seed = torch.initial_seed() % 2**31

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the epoch; each of several devices draws for itself."""
        torch.manual_seed(self._seed + trainer.current_epoch + DEVICES_APART * trainer.global_rank)


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

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Has Ctrl-C in the block end as KeyboardInterrupt; Lightning turns it into an exit of status 1."""
        try:
            yield
        except SystemExit:
            raise KeyboardInterrupt from None
        finally:
            if self._handler_before is not None:  # Lightning sets the signal to be ignored after an interrupt
                signal.signal(signal.SIGINT, self._handler_before)


class History(pl.Callback):
    """Keeps the metrics of each epoch, and the learning rate that it began with, for curves and records."""

    KEYS = ("train_loss", "val_loss", "train_macro_f1", "val_macro_f1", "train_accuracy", "val_accuracy")

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.seconds_before = 0.0
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Seconds of training, validation included, over all sittings."""
        return self.seconds_before + time.monotonic() - self._started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the learning rate: at the end of the last epoch it is zero."""
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Appends the epoch; runs before the checkpoints are written, so a resumed run has it too."""
        values = {key: float(trainer.callback_metrics[key]) for key in self.KEYS if key in trainer.callback_metrics}
        losses = {"training": values["train_loss"], "validation": values.get("val_loss", 0.0)}
        if wrong := [what for what, loss in losses.items() if not np.isfinite(loss)]:
            raise TrainingDivergedError(
                f"the {wrong[0]} loss is {losses[wrong[0]]} after epoch {trainer.current_epoch + 1}. "
                f"Lower the learning rate (now {pl_module.learning_rate:g}) or set precision='32-true'."
            )
        self.epochs.append({"epoch": trainer.current_epoch + 1, **values, "learning_rate": self._learning_rate})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without one epoch there is nothing to record, score or keep."""
        if not self.epochs:
            raise ConfigError(
                "The training ended before its first epoch did. Look at what trainer=... says, such as max_time or "
                "limit_train_batches."
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
            key: [e[key] for e in self.epochs]
            for key in ("epoch", *self.KEYS, "learning_rate")
            if all(key in e for e in self.epochs)
        }


class BestAnswers(pl.Callback):
    """Keeps the answers to the validation maps of the epoch with the best macro F1.

    Attributes:
        best: int64 [N], class numbers in the order of the maps; empty before the first epoch ends.
    """

    def __init__(self) -> None:
        self.best, self._score = np.empty(0, np.int64), -1.0
        self._batches: list[torch.Tensor] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: torch.Tensor, *_: Any
    ) -> None:
        """Collects the answers that `WaferClassifier.validation_step` returns."""
        self._batches.append(outputs.cpu())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps them if they are the best so far; comes before a pruned trial ends."""
        score = float(trainer.callback_metrics["val_macro_f1"])
        if score > self._score:
            self.best, self._score = torch.cat(self._batches).numpy(), score
        self._batches = []

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Keeps them beside the callbacks' own: a training that goes on without this callback would miss them there."""
        checkpoint["best_answers"] = {"answers": torch.from_numpy(self.best), "score": self._score}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Takes up those of the run that is resumed."""
        kept = checkpoint["best_answers"]
        self.best, self._score = kept["answers"].numpy(), kept["score"]


class EpochLines(pl.Callback):
    """Prints a line an epoch, with the time left, where no bar shows the progress.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._epochs, self._started = say, 0, time.monotonic()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the epoch."""
        self._epochs += 1
        metrics, epoch = trainer.callback_metrics, trainer.current_epoch + 1
        left = (trainer.max_epochs - epoch) * (time.monotonic() - self._started) / self._epochs
        limit = next((c for c in trainer.callbacks if isinstance(c, TimeBudget)), None)
        left = min(left, limit.seconds - limit.used()) if limit else left
        self._say(
            f"  epoch {epoch}/{trainer.max_epochs}  val macro F1 {metrics.get('val_macro_f1', 0):.3f}  "
            f"train loss {metrics.get('train_loss', 0):.3f}  at most {max(0.0, left):.0f} s left"
        )

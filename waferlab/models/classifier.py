"""What all networks have in common: one training step, one set of metrics, one optimiser and schedule."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torchmetrics.classification import MulticlassConfusionMatrix

from waferlab.data.images import encode
from waferlab.errors import WeightsUnavailableError, out_of_memory
from waferlab.models.muon import Muon, hidden_kernels
from waferlab.records import StartingWeights

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")


class WaferClassifier(pl.LightningModule):
    """One training step, one set of metrics, one optimiser set-up for all models.

    Subclasses set `self.network` and call `self.save_hyperparameters()` with plain values only, so that their
    checkpoints load with `weights_only=True`.

    Attributes:
        network: float [B, 1, S, S] in -1..1 to logits [B, 9].
        starting_weights: what the network really starts from.
        time_progress: share of a time limit that is used, 0..1 (see `TimeBudget`); the schedule follows it or the
            steps, whichever is further.
        to_go_on: this training is the beginning of a longer one, so its learning rate stays at the peak.
        parts: that a batch is computed in, one after the other; doubled where the memory does not suffice.

    Args:
        learning_rate: peak of the schedule.
        weight_decay: of matrices and kernels; biases and normalisation layers are not decayed.
        optimizer: "adamw", "adam", "sgd" (Nesterov momentum 0.9) or "muon" (`waferlab/models/muon.py`).
        label_smoothing: 0..1, share of the target spread over all classes.
        warmup: share of the training over which the learning rate rises to its peak.
        decay: share of the training, its last part, over which the learning rate falls to zero. Between the two it
            stays, so that what was trained for a while can be gone on with for any length, and finished at any time.
        class_weights: nine loss weights, or None for equal ones.
        num_classes: length of the logits.

    Raises:
        ValueError: an unknown optimizer, or a share that is none.
    """

    network: nn.Module
    starting_weights = StartingWeights("random", reason="not asked for")
    parts, _largest_batch = 1, 0

    def __init__(
        self,
        *,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.05,
        optimizer: str = "adamw",
        label_smoothing: float = 0.05,
        warmup: float = 0.15,
        decay: float = 0.5,
        class_weights: Sequence[float] | None = None,
        num_classes: int = 9,
    ) -> None:
        super().__init__()
        if "pytorch_lightning" in sys.modules:
            warnings.warn(
                "This program imports pytorch_lightning, whose Trainer refuses models of lightning.pytorch as no "
                "LightningModule. Write `import lightning.pytorch as pl`.",
                stacklevel=2,
            )
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r} is unknown. Allowed: {', '.join(OPTIMIZERS)}.")
        if not 0 <= warmup < 1 or not 0 < decay <= 1:
            raise ValueError(f"warmup={warmup!r}, decay={decay!r}: shares of a training. Allowed: 0 to 1, decay not 0.")
        self.learning_rate, self.weight_decay, self.optimizer_name = learning_rate, weight_decay, optimizer
        self.warmup, self.decay = warmup, decay
        self.time_progress, self.to_go_on, self._risen = 0.0, False, False
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.loss = nn.CrossEntropyLoss(weight=weights, label_smoothing=label_smoothing)
        self.confusion = nn.ModuleDict(
            {stage: MulticlassConfusionMatrix(num_classes, validate_args=False) for stage in ("fit", "val")}
        )

    def load_published(self, wait: float) -> str:
        """Loads published weights into `network` and returns their name; what has none keeps this.

        Args:
            wait: seconds for their host to answer.

        Raises:
            WeightsUnavailableError: there are none, or they cannot be had.
        """
        raise WeightsUnavailableError("none are published for this network")

    def set_learning_rate(self, learning_rate: float) -> None:
        """Changes the peak of the schedule, before training; what the checkpoint says of it too."""
        self.learning_rate = self.hparams["learning_rate"] = learning_rate

    def setup(self, stage: str) -> None:
        """Puts kernels in channels-last order: faster convolutions on CPU and GPU, the same results."""
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float [B, 1, S, S] in -1..1 to logits [B, 9]; uint8, as our loaders give without their data module, too."""
        images = encode(images) if images.dtype == torch.uint8 else images
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of one batch of images [B, 1, S, S] and labels int64 [B]; of its last part, where it has several."""
        if self.parts == 1:
            return self._step(batch, "fit")[0]
        self.optimizers(use_pl_optimizer=False).zero_grad()
        *before, last = zip(*(values.chunk(self.parts) for values in batch), strict=True)
        for part in before:
            self.trainer.strategy.backward(self._loss_of_part(part, batch), None)
        return self._loss_of_part(last, batch)

    def _loss_of_part(self, part: tuple[torch.Tensor, ...], batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Its share of the loss of the batch, in which the classes' weights count."""
        weights = self.loss.weight
        size, whole = (len(maps[1]) if weights is None else weights[maps[1]].sum() for maps in (part, batch))
        return self._step(part, "fit")[0] * (size / whole)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Lightning calls it after `training_step`, which has gradients of its own by then where there are parts."""
        if self.parts == 1:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """One step; where the memory does not suffice, the same again in twice as many parts, and so from then on.

        The gradients are those of the whole batch but for batch normalisation, which sees each part by itself.
        """
        step = partial(super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure)
        # Steps before this one have left gradients that it must not lose; devices take the same number of parts.
        if self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1:
            step()
        else:
            self._as_memory_allows(step)

    def _as_memory_allows(self, step: Callable[[], Any]) -> Any:
        """What `step` gives, which is done again in twice as many parts as long as the memory does not suffice."""
        while True:
            try:
                return step()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or 2 * self.parts > self._largest_batch:
                    raise
            self.parts *= 2  # here the error is gone, and with it what the step that failed still held
            gc.collect()

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Adds one batch to the validation loss and metrics; gives the answers, int64 [B]."""
        return self._as_memory_allows(partial(self._step, batch, "val"))[1]

    def _step(self, batch: tuple[torch.Tensor, torch.Tensor], stage: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = batch
        self._largest_batch = max(self._largest_batch, len(labels))
        parts = self.parts if stage == "val" else 1  # of a training step's batch, this is one part already
        logits = torch.cat([self(part) for part in images.chunk(parts)]).float()
        loss = self.loss(logits, labels)
        self.confusion[stage].update(logits.detach(), labels)
        name = "train_loss" if stage == "fit" else "val_loss"
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        return loss, logits.detach().argmax(1)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the epoch: the training ones here too, so that callbacks at its end see both."""
        self._log_metrics("val", prefix="val")
        if self.confusion["fit"].update_called:
            self._log_metrics("fit", prefix="train")

    def _log_metrics(self, stage: str, *, prefix: str) -> None:
        counts = self.confusion[stage].compute().double()
        self.confusion[stage].reset()
        self.log(f"{prefix}_macro_f1", macro_f1(counts))
        self.log(f"{prefix}_accuracy", counts.diagonal().sum() / counts.sum())

    def configure_optimizers(self):
        """The optimiser, and a learning rate that rises to its peak, stays there, and falls to zero."""
        kernels = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": kernels, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        fused = not getattr(self.trainer, "gradient_clip_val", None)  # in bfloat16 Lightning clips no fused one's
        match self.optimizer_name:
            case "adamw":
                optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=fused)
            case "adam":
                optimizer = torch.optim.Adam(groups, lr=self.learning_rate, fused=fused)
            case "sgd":
                optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9, nesterov=True, fused=fused)
            case "muon":
                hidden = {id(p): p for p in hidden_kernels(self.network)}
                rest = [group | {"params": [p for p in group["params"] if id(p) not in hidden]} for group in groups]
                optimizer = Muon([*hidden.values()], rest, lr=self.learning_rate, weight_decay=self.weight_decay)
        self.total_steps = max(1, self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share_of_peak(self, step: int) -> float:
        """The learning rate of a step, 0..1 of its peak: a straight rise, a level, a straight fall."""
        progress = self.progress(step)
        rise = 1.0 if self._risen or progress >= self.warmup else max(0.02, progress / self.warmup)
        return rise if self.to_go_on else min(rise, (1 - progress) / self.decay)

    def progress(self, step: int) -> float:
        """Share of the training that is over at a step, 0..1, by steps or by time, whichever is further."""
        return min(1.0, max(step / self.total_steps, self.time_progress))

    def on_train_start(self) -> None:
        """Counts epochs in that were shorter, as those of a trial that is gone on with may have been."""
        self.plan_schedule(epochs_done=self.trainer.current_epoch)

    def plan_schedule(self, *, epochs_done: int) -> None:
        """Has the schedule end with the Trainer's last epoch, as that is now."""
        if self.trainer.max_epochs > 0:
            share_left = max(0.0, 1 - epochs_done / self.trainer.max_epochs)
            steps_left = share_left * self.trainer.estimated_stepping_batches
            self.total_steps = max(1, round(self.trainer.global_step + steps_left))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Tells whoever goes on from here that the learning rate has risen already."""
        checkpoint["risen"] = self._risen or self.to_go_on

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Takes up the schedule where it was."""
        self._risen = checkpoint.get("risen", False)


def macro_f1(confusion: torch.Tensor) -> torch.Tensor:
    """Mean F1 over the classes that have a true map, from counts [C, C] (rows true).

    The same definition as `sklearn.metrics.f1_score(labels=<classes among the true ones>, average="macro",
    zero_division=0)`: a class that a part of the data lacks says nothing about the model.
    """
    true, answered, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    return (2 * hits / (true + answered).clamp(min=1)).sum() / (true > 0).sum().clamp(min=1)

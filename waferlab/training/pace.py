"""How quickly a network learns on this machine now: in which precision, and with how many threads."""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch

from waferlab.data.images import encode
from waferlab.models.classifier import WaferClassifier
from waferlab.tracking.processes import usable_cores

PROBE_STEPS = 4  # of which the first is not counted
TRY_AGAIN = 20.0  # seconds after which other numbers of threads are tried again: a machine may have become quiet
SLOWER = 1.3  # times the time of a step, as when another program takes a core
# OpenMP's own variable, whose first number is of the outermost loops. What ultralytics sets it to is no word of a user.
TOLD = "" if "ultralytics" in sys.modules else os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()


def possible_precisions(accelerator: str = "auto") -> tuple[str, ...]:
    """Of Lightning, those that the hardware computes in; where there are two, a measurement has to tell."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return ("bf16-mixed",) if torch.cuda.is_bf16_supported(including_emulation=False) else ("32-true",)
    if accelerator in ("auto", "cpu"):
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return ("32-true", "bf16-mixed")
    return ("32-true",)


def seconds_a_step(
    model: WaferClassifier, batch: tuple[torch.Tensor, torch.Tensor], *, precision: str, accelerator: str = "auto"
) -> float:
    """Seconds of one training step with one thread, the median of some; the model stays as it is.

    Args:
        model: to be trained.
        batch: uint8 [B, 1, S, S] and int64 [B].
        precision: "32-true" or "bf16-mixed".
        accelerator: as Lightning is told.
    """
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    device, threads = torch.device("cuda" if on_gpu else "cpu"), torch.get_num_threads()
    seconds = []
    with torch.random.fork_rng():
        try:
            torch.set_num_threads(1)
            probe = copy.deepcopy(model).to(device).train()
            probe.setup("fit")
            optimizer = torch.optim.AdamW(probe.parameters(), fused=True)
            images, labels = (part.to(device) for part in batch)
            for _ in range(PROBE_STEPS):
                started = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                    loss = probe.loss(probe(encode(images)).float(), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                loss.item()  # waits for a GPU
                seconds.append(time.perf_counter() - started)
        finally:
            torch.set_num_threads(threads)
    return statistics.median(seconds[1:])


def cores() -> int:
    """That this process may use: no more than OMP_NUM_THREADS said when it began, so that others have the rest."""
    here = usable_cores()
    return min(here, int(TOLD)) if TOLD.isdecimal() and int(TOLD) else here


class QuickestThreads(pl.Callback):
    """Trains with as many threads as are quickest now.

    On a quiet machine several threads are; beside one busy program a single one is, several times over, as each of the
    many short loops of a step waits for its slowest thread. Which it is, some steps tell at the start, from time to
    time, and when steps become slower. No step is wasted on it; with another number of threads, sums are rounded
    elsewhere, so only a fixed number gives the same weights again.

    Attributes:
        seconds: of a step, by number of threads, when it was last tried.
    """

    def __init__(self, *, most: int | None = None) -> None:
        most = most or cores()
        self._choices = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
        self.seconds: dict[int, float] = {}
        self._left: list[int] = []
        self._steps: deque[float] = deque(maxlen=2 * PROBE_STEPS)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to try."""
        self._try_all()

    def _try_all(self) -> None:
        self._left = list(self._choices)
        self._take(self._left[0])

    def _take(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._steps.clear()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Notes the time of a step, and chooses anew when it is time to."""
        self._steps.append(time.perf_counter() - self._started)
        if self._left:
            if len(self._steps) == PROBE_STEPS:
                self.seconds[self._left.pop(0)] = statistics.median(list(self._steps)[1:])
                self._take(self._left[0] if self._left else min(self._choices, key=self.seconds.__getitem__))
                self._next = time.monotonic() + TRY_AGAIN
        elif time.monotonic() > self._next or self._is_slower():
            self._try_all()

    def _is_slower(self) -> bool:
        known = self.seconds[torch.get_num_threads()]
        return len(self._steps) == self._steps.maxlen and statistics.median(self._steps) > SLOWER * known

"""Memory that one training step frees is kept for the next, and what is said where it does not suffice."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

# Of malloc.h in glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20  # bytes of one piece: the most that glibc takes; larger ones go back, as ever


def keep_freed_memory() -> bool:
    """Tells the C library not to give freed memory back to the system; whether it could be told.

    After each step the memory of its activations is freed. glibc then gives most of it back, and the next step gets it
    again as pages that the kernel has to map and to clear one by one: thousands of page faults, a tenth of the time of
    a step. The highest use of memory stays what it was, and results do not change. Nothing happens where there is no
    glibc. See mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT))


class SmallerParts(pl.Callback):
    """Says once that batches are computed in parts from now on; see `WaferClassifier.optimizer_step`.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._told = say, False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Looks whether the step that has just ended needed them."""
        if pl_module.parts > 1 and not self._told:
            self._told = True
            self._say(
                f"The memory does not suffice for a batch at once: from now on each is computed in {pl_module.parts} "
                "parts whose gradients are added, or more if need be."
            )

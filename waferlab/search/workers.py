"""How many trials run side by side."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from waferlab.training.pace import cores

if TYPE_CHECKING:
    from waferlab.config import ExperimentConfig


def workers_for(config: ExperimentConfig) -> int:
    """How many trials run side by side: as many as there are cores, unless the configuration says otherwise.

    One where a GPU trains, which one training fills, and on systems where a program with threads must not be forked.
    """
    on_a_cpu = config.accelerator in ("auto", "cpu") and not torch.accelerator.is_available()
    if sys.platform != "linux" or not on_a_cpu:
        return 1
    return config.workers or cores()

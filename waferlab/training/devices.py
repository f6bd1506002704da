"""One training on several devices: a process for each, which Lightning joins.

The processes are forked when the training begins and end with it. So there is one program that searches, tracks, writes
and registers, and only the steps of a training are shared. Each batch is dealt out, a part to each device, and the
gradients are averaged: as many steps of as many maps as on one device, and each map once an epoch. Each validation map
is answered once, by one device, and the counts are added up.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, RunError
from waferlab.training.side_by_side import KILLED, Tell, side_by_side

Result = TypeVar("Result")


def on_each_device(
    train: Callable[[int, Tell], Result], config: ExperimentConfig, *, hear: Callable[..., None]
) -> Result:
    """Runs `train(rank, tell)` in a process for each device, and returns what that of rank 0 returns.

    Args:
        train: builds a Trainer with `arguments_of_several` and fits; the same in all processes.
        config: says how many, and of which kind.
        hear: called with the rank and what that process tells, see `side_by_side`.

    Raises:
        What `train` raised, of the first that did.
        ConfigError: the devices are GPUs, which a forked process cannot use once this one has looked at them.
        RunError: one of the processes was killed.
        KeyboardInterrupt: this process was interrupted.
    """
    devices = config.device_count()
    if config.accelerator != "cpu" and torch.accelerator.is_available():
        raise ConfigError(
            f"devices={devices} with GPUs is not possible yet: a training has one GPU. Set devices=1 and give each GPU "
            "a run or a worker of its own, or accelerator='cpu'."
        )
    returned: list[Result] = []
    gone: list[str] = []

    def work(rank: int, tell: Tell) -> None:
        with _joined(rank, devices, Path(folder) / "meeting"):
            result = train(rank, tell)
        if rank == 0:
            tell("returned", result)

    def heard(rank: int, what: str, *content: Any) -> None:
        if what == "returned":
            returned.append(content[0])
        elif what == "killed":
            gone.extend(content)
        else:
            hear(rank, what, *content)

    try:
        with tempfile.TemporaryDirectory() as folder:
            side_by_side(work, workers=devices, hear=heard)
    except RuntimeError as error:  # of those that have lost one of them, as that is heard after it
        if any(KILLED in how for how in gone):
            raise _one_is_gone(gone, devices) from error
        raise
    if not returned:
        raise _one_is_gone(gone, devices)
    return returned[0]


def _one_is_gone(gone: list[str], devices: int) -> RunError:
    how = next((how for how in gone if KILLED in how), gone[0])
    return RunError(
        f"One of the {devices} processes of a training is gone: {how}. Finished epochs are kept: repeat the command "
        "with --resume."
    )


@contextmanager
def _joined(rank: int, devices: int, meeting: Path) -> Iterator[None]:
    """In the block, Lightning takes this process for one of several that somebody has joined, as torchrun does.

    They meet in a file and talk by the loopback: PyTorch's own way listens on all addresses of the machine.
    """
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(devices), "NODE_RANK": "0"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=devices)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def arguments_of_several(devices: int | list[int]) -> dict[str, Any]:
    """Of Lightning's Trainer, in each of the processes; our batches are dealt out already."""
    return {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False}


def from_first(value: float) -> float:
    """The value of rank 0, in all processes of a training; the value itself where there is one process only."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    torch.distributed.broadcast(shared, 0)
    return float(shared)


class SameStatistics(pl.Callback):
    """Before each validation, gives all devices the mean of the statistics that their batch norms have collected."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averages them, so that all devices validate the network that is then saved."""
        for name, buffer in pl_module.network.named_buffers():
            if buffer.is_floating_point() and name.rpartition(".")[2].startswith("running_"):
                buffer.copy_(trainer.strategy.reduce(buffer, reduce_op="mean"))


def make_trainer(**options: Any) -> pl.Trainer:
    """Lightning's Trainer.

    Raises:
        ConfigError: it refuses the options, such as a device that this machine has not.
    """
    try:
        return pl.Trainer(**options)
    except (TypeError, ValueError, ModuleNotFoundError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"Lightning's Trainer refuses this ({reason}). Look at accelerator, devices, precision and trainer."
        ) from error

"""The programs that the campaigns break: the project's own scripts, at work on a tiny file.

Each is forked from a process that has imported everything, so that a life of it takes seconds. It has a session of its
own, and its output goes to a file.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forking import fork

ROOT = Path(__file__).resolve().parents[2]
TINY = ("image_size=16", "batch_size=32", "threads=1")
ONE_MODEL, PAIR = ("--models", "lightning_cnn"), ("lightning_cnn", "vision_transformer")
ENDLESS = 3600.0  # seconds; more than any of these may take


@dataclass(frozen=True)
class Program:
    """A script with its flags; `same_weights` where two unbroken runs end at the same ones."""

    script: str
    flags: tuple[str, ...]
    same_weights: bool = True

    def command(self, data: Path) -> list[str]:
        """As it is typed, without --resume."""
        of_data = () if "pretrain" in self.flags else ("--data", str(data))
        return [str(ROOT / self.script), *of_data, *self.flags]


SEARCH = ("num_optuna_trials=4", "search_epochs=3", "max_epochs=5", "time_limit=null", "early_stopping_patience=50")
PROGRAMS = {
    "demo": Program("demo.py", (*TINY, *SEARCH, "workers=1")),
    "demo, two trials at a time": Program("demo.py", (*TINY, *SEARCH, "workers=2"), same_weights=False),
    "production": Program(
        "run_experiment.py",
        ("--mode", "production", *ONE_MODEL, "--epochs", "4", "--trials", "3", *TINY, "search_epochs=2", "workers=1"),
    ),
    "comparison": Program(
        "run_experiment.py",
        ("--mode", "comparison", "--models", *PAIR, "--seeds", "0", "1", "--epochs", "2", *TINY),
    ),
    "ablation": Program(
        "run_experiment.py",
        ("--mode", "ablation", "--seeds", "0", "--epochs", "2", "--trials", "2", *TINY, "search_epochs=1", "workers=1"),
    ),
    "pretrain": Program(
        "run_experiment.py", ("--mode", "pretrain", "--maps", "3000", "--image-size", "16", "threads=1")
    ),
}


def make_data(file: Path) -> Path:
    """360 generated maps in the project's layout."""
    import numpy as np

    from waferlab.data.generator import generate_wafer_maps
    from waferlab.data.maps import CLASS_NAMES

    maps, labels, lots = generate_wafer_maps(40, seed=5)
    np.savez(
        file,
        maps_flat=np.concatenate([one.ravel() for one in maps]),
        offsets=np.cumsum([0, *(one.size for one in maps)]),
        shapes=np.array([one.shape for one in maps]),
        labels=np.array(CLASS_NAMES)[labels],
        group=lots,
    )
    return file


def start(command: Sequence[str], folder: Path, log: Path, *, first: Callable[[], None] = lambda: None) -> int:
    """Forks a program and returns its process number, which is that of its session, too.

    Args:
        command: what stands behind `python` on a command line.
        folder: where it works.
        log: what it prints is added to this file.
        first: called in it before the program begins.
    """
    out, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.open(os.devnull, os.O_RDONLY)
    try:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        return fork(command, files=(nothing, out, out), folder=str(folder), env=env, first=first)
    finally:
        os.close(out)
        os.close(nothing)


def wait(child: int, seconds: float = ENDLESS) -> int | None:
    """How it ended, as the shell counts (128 and the signal's number for a killed one); None if it has not yet."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def count_epochs(file: Path) -> Callable[[], None]:
    """What makes a program note each epoch that it begins, by a byte in a file."""

    def install() -> None:
        from waferlab.training.callbacks import SeedEachEpoch

        begin, notes = SeedEachEpoch.on_train_epoch_start, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def noted(self, trainer, pl_module):
            os.write(notes, b".")
            return begin(self, trainer, pl_module)

        SeedEachEpoch.on_train_epoch_start = noted

    return install


def moments(seed: int) -> random.Random:
    """Draws the moments of a campaign: the same seed, the same moments."""
    return random.Random(seed)

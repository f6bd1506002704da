"""The programs that the campaigns break: the project's own scripts, at work on a tiny file.

Each is forked from a process that has imported everything, so that a life of it takes seconds. It has a session of its
own, its output goes to a file, and it ends as a program ends that was started from a shell.
"""

from __future__ import annotations

import atexit
import os
import random
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def import_everything() -> None:
    """What a forked program needs, so that it does not import it anew.

    Raises:
        RuntimeError: an import has started a thread, which a fork would lose.
    """
    import mlflow.pyfunc
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import optuna.visualization.matplotlib  # noqa: F401
    import torch
    import torchvision.models  # noqa: F401

    import integrated_pipeline  # noqa: F401
    from waferlab.deployment import onnx_export, predictor, promotion  # noqa: F401
    from waferlab.tracking import loggers, runs  # noqa: F401

    torch.set_num_threads(1)
    assert mlflow.pyfunc
    if threading.active_count() > 1:
        raise RuntimeError(f"Threads run that a fork would lose: {threading.enumerate()}")


def start(command: Sequence[str], folder: Path, log: Path, *, first: Callable[[], None] = lambda: None) -> int:
    """Forks a program and returns its process number, which is that of its session, too.

    Args:
        command: the script's path and its flags.
        folder: where it works.
        log: what it prints is added to this file.
        first: called in it before the script begins.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        atexit._clear()  # what the parent would do at its end is none of this program's
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.chdir(folder)
        sys.argv = list(command)
        first()
        status = _run(command[0])
    finally:
        os._exit(status)


def _run(script: str) -> int:
    """The script as a program; its exit status."""
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


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

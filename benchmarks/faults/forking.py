"""Programs that begin in a moment: each is forked from a process that has imported what all of them import.

To import PyTorch, Lightning, scikit-learn and MLflow takes longer than most of what a test or a campaign lets a program
do. What is forked is a process of its own, with the environment, folder, files and signals that it is given; it can be
killed like any other, and ends as Python itself would end it.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def import_everything() -> None:
    """What a forked program needs, so that it does not import it anew; torch's exporter finds all of its by working.

    Raises:
        RuntimeError: something has started a thread, which a fork would lose.
    """
    from waferlab.tracking.runs import QUIET

    os.environ.update(QUIET)  # as a program of ours has it before it imports MLflow
    import alembic.command  # noqa: F401
    import mlflow.onnx
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.system_metrics.system_metrics_monitor  # noqa: F401
    import optuna.visualization.matplotlib  # noqa: F401
    import optuna_integration  # noqa: F401
    import seaborn  # noqa: F401
    import sklearn.metrics
    import sklearn.model_selection  # noqa: F401
    import torch
    import torchvision.models  # noqa: F401
    import tqdm

    import integrated_pipeline  # noqa: F401
    from waferlab.deployment import predictor, promotion  # noqa: F401
    from waferlab.deployment.onnx_export import export_onnx
    from waferlab.tracking import loggers, runs  # noqa: F401

    runs.empty_database()
    torch.set_num_threads(1)  # a fork would lose the others, and the one that watches progress bars
    tqdm.tqdm.monitor_interval = 0
    with tempfile.TemporaryDirectory() as folder:
        network = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(4, 9)).eval()
        export_onnx(network, Path(folder) / "model.onnx", image_size=16)
    if threading.active_count() > 1:
        raise RuntimeError(f"Threads run that a fork would lose: {threading.enumerate()}")


def fork(
    args: Sequence[str], *, files: Sequence[int], folder: str, env: Mapping[str, str], session: bool = True,
    first: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Starts a program and returns its process number; with a session, that of its session, too.

    Args:
        args: as behind `python` on a command line: `-c code`, `-m module` or a script, and what they are given.
        files: descriptors of its standard input, output and error.
        folder: where it works.
        env: its environment, whole.
        session: it has one of its own.
        first: called in it before the program begins.
    """
    sys.stdout.flush()
    hears, tells = os.pipe()
    child = os.fork()
    if child:
        os.close(tells)
        os.read(hears, 1)  # ends when the child has its session: who asks for its process group must not get ours
        os.close(hears)
        return child
    status = 70
    try:
        os.close(hears)
        atexit._clear()  # what the parent would do at its end is none of this program's
        if session:
            os.setsid()
        os.close(tells)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for place, file in enumerate(files):
            os.dup2(file, place)
        for file in {*files} - {0, 1, 2}:
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
        gc.freeze()
        first()
        status = _as_program(list(args))
    finally:
        os._exit(status)


def _as_program(args: list[str]) -> int:
    """Runs it as Python would, and gives its exit status."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    while args[0] == "-u" or args[0].startswith("-X"):
        args = args[1:]
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    status: int = 0
    try:
        if args[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *args[2:]], [""]
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(args[1], "<string>", "exec"), main.__dict__)
        elif args[0] == "-m":
            sys.argv, sys.path[:0] = [args[1], *args[2:]], [""]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = args, [os.path.dirname(os.path.abspath(args[0]))]
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:  # as Python itself ends then
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status

"""Workers of a search: how many run side by side here, and one that joins a search from any other machine.

    python -m waferlab.search.workers --storage postgresql+psycopg://user@host/optuna --model lightning_cnn

Start it as often as there are machines, before or after the program that leads the search; it takes the configuration
from the study, runs trials until there are enough of them, and ends. What is said here counts over it: --data, where
the maps lie elsewhere on this machine, or any OPTION=VALUE. Killed, it costs its trial a second start; stopped with
Ctrl-C or SIGTERM, it hands the trial back at once.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from waferlab import command_line
from waferlab.errors import ConfigError, SearchFailedError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from waferlab.config import ExperimentConfig

EXAMPLES = """\
  python -m waferlab.search.workers --storage postgresql+psycopg://optuna@db/optuna --model lightning_cnn
  python -m waferlab.search.workers --storage $STORAGE --model my_net --register my_models --data /data/maps.npz
  python -m waferlab.search.workers --storage $STORAGE --model yolo_inspired workers=1 tracking_uri=http://mlflow:5000"""
LOOK_EVERY = 2.0  # seconds, for a study that is not there yet
COMES_AGAIN = 60.0  # seconds in which a leader that was cut off is started again, or it is not
STOPPED = "Its trial runs again, elsewhere or here: start the worker again."
HERE = {"resume": False, "enable_optuna": True}  # of a worker, whatever the leader's are


def workers_for(config: ExperimentConfig) -> int:
    """How many trials run side by side: as many as there are cores, unless the configuration says otherwise.

    One where a GPU trains, which one training fills, and on systems where a program with threads must not be forked.
    """
    import torch

    from waferlab.training.pace import cores

    on_a_cpu = config.accelerator in ("auto", "cpu") and not torch.accelerator.is_available()
    if sys.platform != "linux" or not on_a_cpu:
        return 1
    return config.workers or cores()


@contextmanager
def what_is_here_stays() -> Iterator[None]:
    """Spares the block's collections of garbage the libraries: hundreds of thousands of objects that live to the end.

    There is one after each trial, which in a short search takes longer than anything else but the training. Processes
    that are forked in the block go on sharing these objects' memory.
    """
    gc.collect()  # so that no garbage is kept
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def main() -> int:
    """Joins a search with the command line's arguments and returns the exit status."""
    parser = make_parser()
    arguments = command_line.parse(parser)
    if not 0 <= arguments.wait < math.inf:
        parser.error(f"argument --wait: {arguments.wait:g} are no seconds that end. Give a number from 0.")
    return command_line.run(lambda: join(arguments), when_stopped=STOPPED)


def make_parser() -> argparse.ArgumentParser:
    """The flags of a worker."""
    parser = command_line.make_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--storage", required=True, metavar="URL", help="of the study's database")
    add("--model", required=True, metavar="NAME", help="that is searched")
    add("--experiment", metavar="NAME", help="of the leader; needed where several search this model in one database")
    add("--register", metavar="MODULE", help="module to import first, which registers models of your own")
    add("--wait", type=float, default=600.0, metavar="S", help="seconds for the search to begin (default 600)")
    return parser


def join(arguments: argparse.Namespace) -> None:
    """The work itself; imported late, so that --help and wrong flags answer at once."""
    story = importlib.import_module("integrated_pipeline")  # the one thing here that runs whole pipelines
    if arguments.register:
        _import(arguments.register)
    from waferlab.search.budget import SearchPlan
    from waferlab.search.database import open_database
    from waferlab.tracking.runs import Run

    found = wait_for_search(open_database(arguments.storage, heartbeat=15), arguments)
    if found is None:
        print("That search is over.", flush=True)
        return
    name, search = found
    check_models(search["config"]["model_type"])
    leaders = {**search["config"], **HERE, "storage": arguments.storage}
    pipeline = story.IntegratedMLPipeline(story.ExperimentConfig(**command_line.options_of(arguments, leaders)))
    pipeline.say(f"joins the search {name}", style="bold")
    pipeline.prepare_data()
    with pipeline.open_tracking().closing(), what_is_here_stays():
        if search["run"]:
            pipeline.model_runs[arguments.model] = Run(arguments.model, id=search["run"])
        try:
            pipeline.search(arguments.model, SearchPlan(**search["plan"], until=search["until"]), leads=False)
        except SearchFailedError as error:  # the leader's affair
            pipeline.say(f"  {error}")
    pipeline.say("The search has as many trials as it wants, or no time left.")


def _import(module: str) -> None:
    sys.path.insert(0, "")  # modules of the working folder
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--register {module}: {error}. Start the worker where Python finds it.") from error


def check_models(names: str | list[str]) -> None:
    """Raises ConfigError if the leader trains a model, be it after this one, that is not registered here."""
    from waferlab.models.registry import MODEL_REGISTRY

    listed = [names] if isinstance(names, str) else names
    if unknown := [name for name in listed if name not in ("all", *MODEL_REGISTRY)]:
        raise ConfigError(
            f"The leader also trains {unknown[0]}, which nothing here registers. Name the module that does with "
            "--register."
        )


def wait_for_search(storage: BaseStorage, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]] | None:
    """The name of the search of a model, and what its leader has left for those who join.

    None if it is over: at once a leader that was cut off may come again, so that is waited for, but not for long. What
    was over before may be an earlier one of the same database, unless its experiment is named.

    Raises:
        ConfigError: none has begun, or there are several.
    """
    began, told = time.monotonic(), False
    while True:
        searches = searches_of(storage, arguments.model, arguments.experiment)
        found = {name: search for name, search in searches.items() if goes_on(storage, name, search)}
        if len(found) > 1:
            experiments = ", ".join(sorted(name.rpartition("/")[0] for name in found))
            raise ConfigError(f"{arguments.model} is searched in {experiments}. Name one of them with --experiment.")
        if found:
            return next(iter(found.items()))
        waited = time.monotonic() - began
        if searches and waited > (min(arguments.wait, COMES_AGAIN) if arguments.experiment else arguments.wait):
            return None
        if waited > arguments.wait:
            raise ConfigError(
                f"No search of {arguments.model} has begun in {arguments.wait:g} s. Start the program that leads it, "
                "with storage=... of the same database, or wait longer (--wait)."
            )
        if not told and not arguments.quiet:
            print(f"waits for a search of {arguments.model} to begin", flush=True)
        told = True
        time.sleep(LOOK_EVERY)


def searches_of(storage: BaseStorage, model_type: str, experiment: str | None) -> dict[str, dict[str, Any]]:
    """What the leaders of all searches of a model have left, by the name of the study; of one experiment, if named."""
    return {
        study.study_name: search
        for study in storage.get_all_studies()
        if (search := storage.get_study_user_attrs(study._study_id).get("search"))
        and study.study_name.rpartition("/")[2] == model_type
        and experiment in (None, study.study_name.rpartition("/")[0])
    }


def goes_on(storage: BaseStorage, name: str, search: Mapping[str, Any]) -> bool:
    """Whether a search has time left, and trials that have not come to their end."""
    if search["until"] is not None and time.time() >= search["until"]:
        return False
    import optuna

    from waferlab.search.trials import counted_trials

    study = optuna.load_study(study_name=name, storage=storage)
    return len(counted_trials(study)) < search["plan"]["trials"]


if __name__ == "__main__":
    sys.exit(main())

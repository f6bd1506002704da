r"""Many workers on one study: trials an hour with 1, 2 and 4 here, and what saturates first with many more.

First real trials of one search, in an empty PostgreSQL database: the small CNN on generated maps, settings that differ
in their learning rate alone, none stopped, by 1, 2 and 4 processes of one thread each. Then what all workers share,
each asked for all that it gives by clients that train nothing: the database by whole trials as the pipeline has them
(parameters, a report an epoch, answers, record), also in a study that has a thousand trials already; an MLflow server
by whole runs; the folder of weights by the two checkpoints of a trial. Clients and servers are on the same cores, so
what is found is what a machine of that size gives at least. From these rates follows which share of each N workers
would take, with trials of so many seconds; that is arithmetic, no measurement.

    python benchmarks/workers.py --storage postgresql+psycopg://optuna@127.0.0.1/empty \
        --output benchmarks/results/workers.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from busy_machine import searched
from measure import rows, take_turns, write_record
from provenance import BATCHES, FAMILY, GENERATOR, SEARCH, SPLIT, TRAINING

MEASURES = (*GENERATOR, *SPLIT, *BATCHES, *TRAINING, *SEARCH, *FAMILY["lightning_cnn"], "PatientDatabase", "TrialFiles")
ANSWERS, EPOCHS = 7_000, 8  # validation maps that a trial's answers are kept of, and reports of a trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True, metavar="URL", help="of an empty PostgreSQL database")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--trials", type=int, default=12, help="of a search")
    parser.add_argument("--epochs", type=int, default=3, help="of a trial")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="that clients ask for")
    parser.add_argument("--older-trials", type=int, default=1000)
    parser.add_argument("--samples-per-class", type=int, default=150)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    record: dict[str, Any] = {"benchmark": "workers", "trials": arguments.trials, "epochs": arguments.epochs}
    record["database"] = [
        database(arguments, clients=clients, older=older)
        for older in (0, arguments.older_trials)
        for clients in arguments.clients
    ]
    record["tracker"] = [tracker(arguments, clients=clients) for clients in arguments.clients]
    record["weights"] = weights(arguments)
    ways = {n: partial(search, arguments, n) for n in arguments.workers}
    turns = take_turns(ways, repeats=arguments.repeats)
    record["searches"] = [
        {"workers": n, "seconds": [round(s, 1) for s in turns[n]],
         "trials_an_hour": round(3600 * arguments.trials / statistics.mean(turns[n]))}
        for n in ways
    ]  # fmt: skip
    for found in record["searches"]:
        print(json.dumps(found), flush=True)
    record["plan"] = plan(record)
    turns_in_words = "one turn" if arguments.repeats == 1 else f"{arguments.repeats} turns"
    write_record(
        arguments.output, record, measures=MEASURES, search="as each row says",
        repeats=f"{turns_in_words}, {arguments.seconds:g} s of each number of clients",
    )  # fmt: skip


def search(arguments: argparse.Namespace, workers: int) -> float:
    """Seconds of a search by so many processes of one thread."""
    with tempfile.TemporaryDirectory() as shared:
        return searched(
            arguments, "lightning_cnn", workers=workers, threads=1, experiment_name=uuid.uuid4().hex[:8],
            storage=arguments.storage, artifacts=shared,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- what all workers share


def crowd(client: Callable[..., None], clients: int, *given: Any, look: Callable[[], int] | None = None) -> dict:
    """How many in a second so many clients get done, from when all are ready; and what `look` saw meanwhile."""
    context = multiprocessing.get_context("spawn")
    ready, over, done = context.Barrier(clients + 1), context.Event(), context.Value("i", 0)
    crew = [context.Process(target=client, args=(ready, over, done, *given), daemon=True) for _ in range(clients)]
    for process in crew:
        process.start()
    ready.wait(timeout=300)
    started, seconds = time.monotonic(), given[0].seconds
    time.sleep(seconds / 2)
    seen = look() if look else 0
    time.sleep(max(0.0, started + seconds - time.monotonic()))
    count, elapsed = done.value, time.monotonic() - started
    over.set()
    for process in crew:
        process.join(timeout=60)
        process.kill()
    return {"clients": clients, "a_second": round(count / elapsed, 2), "seen": seen}


def database(arguments: argparse.Namespace, *, clients: int, older: int) -> dict:
    """Whole trials a second, and connections a client."""
    from sqlalchemy import create_engine, text

    name = f"{uuid.uuid4().hex[:8]}/made_up"
    study = open_empty(arguments.storage, name)
    fill(study, older)
    engine = create_engine(arguments.storage)

    def connections() -> int:
        with engine.connect() as connection:
            return connection.execute(text("select count(*) from pg_stat_activity where datname is not null")).scalar()

    before = connections()
    found = crowd(run_trials, clients, arguments, name, look=connections)
    found |= {"older_trials": older, "connections_a_client": round((found.pop("seen") - before) / clients, 2)}
    print(json.dumps(found), flush=True)
    return found


def open_empty(storage: str, name: str) -> Any:
    """The study as a worker opens it."""
    import optuna

    from waferlab.search.storage import study_storage
    from waferlab.search.study import make_sampler, open_study

    return open_study(
        name, storage=study_storage(storage, journal=Path("unused"), heartbeat=15), directions=["maximize"],
        sampler=lambda n: make_sampler("random", seed=0, trials_so_far=n, shared=True),
        pruner=optuna.pruners.NopPruner(), first=[], fingerprint="made up", go_on=True,
    )  # fmt: skip


def fill(study: Any, trials: int) -> None:
    """Adds trials that have ended."""
    import optuna

    distribution = optuna.distributions.FloatDistribution(0, 1)
    study.add_trials([
        optuna.create_trial(value=0.5, params={"x": 0.5}, distributions={"x": distribution}) for _ in range(trials)
    ])  # fmt: skip


def run_trials(ready: Any, over: Any, done: Any, arguments: argparse.Namespace, name: str) -> None:
    """A client of the database: trials without a training, with all else that a trial has."""
    import numpy as np

    from waferlab.search.budget import SearchBudget, SearchPlan
    from waferlab.search.database import lost_trials_watched
    from waferlab.search.trials import pack_answers
    from waferlab.tracking.processes import this_process

    study = open_empty(arguments.storage, name)
    budget = SearchBudget(study, SearchPlan(10**6, EPOCHS))
    answers = pack_answers(np.random.default_rng(0).integers(9, size=ANSWERS))

    def objective(trial: Any) -> float:
        for parameter in ("learning_rate", "batch_size", "dropout", "weight_decay"):
            trial.suggest_float(parameter, 0, 1)
        trial.set_user_attr("process", this_process())
        trial.set_user_attr("proposed_by", "chance")
        for epoch in range(EPOCHS):
            trial.report(0.5, epoch)
            trial.should_prune()
        for attribute in ("macro_f1", "latency", "parameters"):
            trial.set_user_attr(attribute, 0.5)
        trial.set_user_attr("record", {"history": {key: [0.5] * EPOCHS for key in "abcdefg"}})
        trial.set_user_attr("answers", answers)
        return 0.5

    study.optimize(objective, n_trials=1)  # to warm up
    ready.wait(timeout=300)
    with lost_trials_watched(study):
        while not over.is_set() and budget.starts_another(study):
            study.optimize(objective, n_trials=1)
            with done.get_lock():
                done.value += 1


def tracker(arguments: argparse.Namespace, *, clients: int) -> dict:
    """Whole runs a second that an MLflow server of one process on sqlite takes."""
    from waferlab.tracking.runs import make_database
    from waferlab.tracking.server import MlflowServer

    with tempfile.TemporaryDirectory() as folder:
        make_database(Path(folder) / "mlflow.db", files=Path(folder).as_uri())
        server = MlflowServer(f"sqlite:///{folder}/mlflow.db")
        try:
            server.wait_until_up()
            found = crowd(run_runs, clients, arguments, server.url, folder)
        finally:
            server.stop()
    del found["seen"]
    print(json.dumps(found), flush=True)
    return found


def run_runs(ready: Any, over: Any, done: Any, arguments: argparse.Namespace, url: str, folder: str) -> None:
    """A client of the tracker: the runs of trials, with metrics of each epoch."""
    from waferlab.tracking.runs import RunTree

    mine = Path(folder) / str(os.getpid())
    mine.mkdir()

    def one_run() -> None:  # `close` waits until all is written
        runs = RunTree("made_up", uri=url, folder=mine, warn=sys.exit)
        run = runs.start("trial")
        runs.params(run, batch_size=32, learning_rate=4e-3, dropout=0.1, weight_decay=0.05)
        for epoch in range(EPOCHS):
            losses = dict.fromkeys(("train_loss", "val_loss", "val_macro_f1", "val_accuracy"), 0.5)
            runs.metrics(run, losses, step=epoch)
        runs.end(run)
        runs.close()

    one_run()  # to warm up
    ready.wait(timeout=300)
    while not over.is_set():
        one_run()
        with done.get_lock():
            done.value += 1


def weights(arguments: argparse.Namespace) -> dict:
    """Megabytes of a trial, and in a second, on the disk of this machine."""
    from measure import plain_config

    from integrated_pipeline import IntegratedMLPipeline

    with tempfile.TemporaryDirectory() as folder:
        config = plain_config(
            model_type="lightning_cnn", samples_per_class=20, search_epochs=1, num_optuna_trials=1, output_dir=folder,
            storage=f"sqlite:///{folder}/study.db", workers=1, threads=1,
        )  # fmt: skip
        pipeline = IntegratedMLPipeline(config)
        config.results_dir.mkdir(parents=True)
        pipeline.prepare_data()
        pipeline.search("lightning_cnn")
        study, files = pipeline.studies["lightning_cnn"], pipeline._trial_files("lightning_cnn")
        size, trial = sum(file.stat().st_size for file in (files.best(0), files.state(0))), study.ask()
        for of_trial in (files.best, files.state):
            shutil.copy(of_trial(0), of_trial(trial.number))
        count, started = 0, time.monotonic()
        while time.monotonic() < started + arguments.seconds / 4:
            files.share(trial)
            count += 1
        os.sync()
        elapsed = time.monotonic() - started
    return {"megabytes_a_trial": round(size / 1e6, 2), "megabytes_a_second": round(count * size / 1e6 / elapsed, 1)}


def plan(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Arithmetic: the share of each that N workers would take, with trials of so many seconds."""
    one = min(record["searches"], key=lambda found: found["workers"])
    short = round(statistics.mean(one["seconds"]) / record["trials"] * one["workers"], 1)
    of_old_study = [found for found in record["database"] if found["older_trials"]] or record["database"]
    rates = {
        "database": max(found["a_second"] for found in of_old_study),
        "tracker": max(found["a_second"] for found in record["tracker"]),
        "weights": record["weights"]["megabytes_a_second"] / record["weights"]["megabytes_a_trial"],
    }
    connections = max(found["connections_a_client"] for found in record["database"])
    return [
        {"workers": workers, "seconds_a_trial": seconds, "connections": round(workers * connections),
         **{name: round(workers / seconds / rate, 3) for name, rate in rates.items()}}
        for seconds in (short, 60.0, 600.0)
        for workers in (10, 100, 1000)
    ]  # fmt: skip


def table_of_workers(record: dict[str, Any]) -> list[str]:
    """For benchmarks/README.md."""
    searches = rows(
        "workers, seconds, trials an hour",
        [[str(found["workers"]), ", ".join(f"{s:.1f}" for s in found["seconds"]), f"{found['trials_an_hour']:,}"]
         for found in record["searches"]],
    )  # fmt: skip
    shared = rows(
        "what, clients, a second",
        [[f"trials of a study with {found['older_trials']:,} before", str(found["clients"]), f"{found['a_second']:.1f}"]
         for found in record["database"]]
        + [["runs of an MLflow server", str(found["clients"]), f"{found['a_second']:.1f}"]
           for found in record["tracker"]],
    )  # fmt: skip
    planned = rows(
        "workers, seconds a trial, connections, of the database, of the MLflow server, of the disk",
        [[f"{row['workers']:,}", f"{row['seconds_a_trial']:g}", f"{row['connections']:,}",
          *(f"{row[name]:.0%}" for name in ("database", "tracker", "weights"))] for row in record["plan"]],
    )  # fmt: skip
    sizes = record["weights"]
    note = (
        f"A trial leaves {sizes['megabytes_a_trial']:g} MB of weights; this disk takes "
        f"{sizes['megabytes_a_second']:,.0f} MB a second."
    )
    return [*searches, "", *shared, "", note, "", "What N workers would ask of these, by arithmetic:", "", *planned]


if __name__ == "__main__":
    main()

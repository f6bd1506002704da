"""What grows that should not: a service at half its load, a search of a thousand trials, ten thousand versions.

service   the service answers for so many minutes half as many requests a second as it can; its memory, open files and
          the median time of an answer, in tenths of the time
search    a real search of so many trials of an epoch on 180 maps; memory, open files and seconds a trial, by tenths
registry  a registered model of so many versions: seconds and memory to list them

    python benchmarks/faults/soak.py --minutes 60 --trials 1000 --versions 10000 --output benchmarks/results/soak.json

Memory is resident, in MiB. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from measure import plain_config, write_record
from provenance import SEARCH, TRAINING
from serving import NPY, as_npy, ask, one_lot, ours, started, untrained

MEASURES = (*TRAINING, *SEARCH, "worth_keeping", "what_is_here_stays", "Predictor", "create_app", "ModelRegistry")
TENTHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of the service")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "soak", "minutes": arguments.minutes}
    soaks = {
        "registry": lambda: soak_registry(arguments.versions),
        "search": lambda: soak_search(arguments.trials),
        "service": lambda: soak_service(arguments.minutes),
    }
    for name, soak in soaks.items():
        record[name] = soak()
        print(name, json.dumps(record[name]), flush=True)
    write_record(arguments.output, record, measures=MEASURES, repeats="once", search="as it says")


def holds(pid: int | None = None) -> dict[str, int]:
    """Memory and open files of a process, this one by default."""
    import psutil

    process = psutil.Process(pid)
    return {"memory_mib": round(process.memory_info().rss / 2**20), "files": process.num_fds()}


def soak_service(minutes: float) -> list[dict[str, Any]]:
    """Half the load that one client at a time brings about."""
    request = ("/predict", NPY, as_npy(one_lot(1, 0)))
    with tempfile.TemporaryDirectory() as folder, started(ours(untrained(Path(folder) / "model.onnx"))) as up:
        process, port, _ = up
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            pause, found = statistics.median(seconds_of(connection, request, 200, 0.0)), []
            for _ in range(TENTHS):
                until, seconds = time.monotonic() + 60 * minutes / TENTHS, []
                while time.monotonic() < until:
                    seconds += seconds_of(connection, request, 50, pause)
                row = {"requests": len(seconds), "median_ms": round(1000 * statistics.median(seconds), 2)}
                found.append(row | holds(process.pid))
    return found


def seconds_of(connection: http.client.HTTPConnection, request: Any, n: int, pause: float) -> list[float]:
    """Of each of n requests, with a pause after each."""
    found = []
    for _ in range(n):
        began = time.perf_counter()
        status, _ = ask(connection, request)
        found.append(time.perf_counter() - began)
        if status != 200:
            raise RuntimeError(f"answered with status {status}")
        time.sleep(pause)
    return found


def soak_search(trials: int) -> list[dict[str, Any]]:
    """A search as the pipeline does it, with a study in a file and runs in MLflow."""
    from integrated_pipeline import IntegratedMLPipeline

    found, began = [], 0.0

    class Watched(IntegratedMLPipeline):
        """Notes what it holds after each tenth of the trials."""

        def optuna_objective(self, trial: Any, model_type: str) -> Any:
            nonlocal began
            began = began or time.perf_counter()
            value = super().optuna_objective(trial, model_type)
            done, tenth = trial.number + 1, max(1, trials // TENTHS)
            if done % tenth == 0:
                seconds = (time.perf_counter() - began) / tenth
                found.append({"trials": done, "seconds_a_trial": round(seconds, 3)} | holds())
                began = time.perf_counter()
            return value

    with tempfile.TemporaryDirectory() as folder:
        config = plain_config(
            model_type="lightning_cnn", samples_per_class=20, image_size=16, search_epochs=1, max_epochs=1, workers=1,
            num_optuna_trials=trials, output_dir=folder, threads=1, enable_mlflow=True, registry_name=None,
            enable_optuna=True, pruner="none",
        )  # fmt: skip
        Watched(config).run_complete_pipeline()
    return found


def soak_registry(versions: int) -> list[dict[str, Any]]:
    """Lists a model's versions when there are ten, and when there are all."""
    from mlflow import MlflowClient

    from waferlab.tracking.runs import RunTree, make_database

    found = []
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "mlflow.db"
        make_database(database, files=Path(folder).as_uri())
        client, uri = MlflowClient(f"sqlite:///{database}"), f"sqlite:///{database}"
        client.create_registered_model("many")
        tree = RunTree("soak", uri=uri, folder=Path(folder), warn=print)
        for before, many in ((0, 10), (10, versions)):
            for number in range(before, many):
                client.create_model_version("many", f"{folder}/{number}")
            client.set_registered_model_alias("many", "champion", str(many))
            began = time.perf_counter()
            listed = tree.versions("many")
            seconds = time.perf_counter() - began
            if len(listed) != many or listed[-1].aliases != ("champion",):
                raise SystemExit(f"{len(listed)} of {many} versions are listed, the last with {listed[-1].aliases}.")
            found.append({"versions": many, "seconds": round(seconds, 3)} | holds(os.getpid()))
        tree.close()
    return found


if __name__ == "__main__":
    main()

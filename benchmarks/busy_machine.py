"""What another busy program costs, and what trials side by side gain.

Measured, in processes of their own and in turn: `quick_start.py`, whole, on a quiet machine and beside one process that
keeps a core busy, once as it is (it trains with as many threads as are quickest at the moment) and once with threads
fixed to the number of cores, as PyTorch takes by itself; and the same trials of one search, with as many processes as
there are cores, with one process that has all threads, again quiet and beside the busy one. The ratio of a pair is of
one turn. Trials differ from the default parameters in their learning rate alone, so that all take the same time, and
none is stopped.

    python benchmarks/busy_machine.py --output benchmarks/results/busy_machine.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from measure import ROOT, as_text, paired_ratio, take_turns, write_record
from provenance import BATCHES, FAMILY, GENERATOR, SEARCH, SPLIT, TRAINING

MEASURES = (*GENERATOR, *SPLIT, *BATCHES, *TRAINING, *SEARCH, *FAMILY["torchvision_resnet"], *FAMILY["lightning_cnn"])
SEARCHED = """
import json, sys, time
import integrated_pipeline
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

def rates_only(trial, model_type, *, batch_size, **_):
    return {"learning_rate": trial.suggest_float("learning_rate", 5e-4, 2e-3), "batch_size": batch_size}

integrated_pipeline.suggest_parameters = rates_only
pipeline = IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1])))
pipeline.config.results_dir.mkdir(parents=True)
pipeline.prepare_data()
pipeline.data_module().setup()
started = time.monotonic()
found = pipeline.search(pipeline.config.model_types()[0])
print(json.dumps([time.monotonic() - started, len(found.trials)]))
"""


QUICK_START = """
import sys
from waferlab.config import ExperimentConfig

ExperimentConfig.__init__.__kwdefaults__["threads"] = int(sys.argv.pop(1)) or None
import quick_start

quick_start.main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="of a trial")
    parser.add_argument("--models", nargs="+", default=["lightning_cnn", "torchvision_resnet"])
    parser.add_argument("--samples-per-class", type=int, default=150)
    parser.add_argument("--without-quick-start", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    cores = len(os.sched_getaffinity(0))
    ways = {}
    if not arguments.without_quick_start:
        ways |= {f"quick_start, {cores if n else 'the quickest'} threads": partial(quick_start, n) for n in (0, cores)}
    for model in arguments.models:
        ways |= {
            f"{model}, side by side": partial(searched, arguments, model, workers=cores),
            f"{model}, one after the other": partial(searched, arguments, model, workers=1, threads=cores),
        }
    both = {(name, busy): partial(under, busy, way) for name, way in ways.items() for busy in (False, True)}
    take_turns({name: way for name, way in both.items() if not name[1]}, repeats=1)
    turns = take_turns(both, repeats=arguments.repeats)
    rows = [row(name, turns, arguments.trials) for name in ways]
    for found in rows:
        busy = as_text(found["busy_over_quiet"])
        print(f"{found['what']:40} quiet {found['quiet']}, busy {found['busy']}, ratio {busy}")
    gains = {
        model: {
            busy: paired_ratio(turns[f"{model}, one after the other", busy == "busy"],
                               turns[f"{model}, side by side", busy == "busy"])
            for busy in ("quiet", "busy")
        }
        for model in arguments.models
    }  # fmt: skip
    print(json.dumps(gains))
    write_record(
        arguments.output,
        {"benchmark": "busy_machine", "rows": rows, "side_by_side_times_quicker": gains, "trials": arguments.trials},
        measures=MEASURES, repeats=f"{arguments.repeats} turns after one to warm up", search="as each row says",
    )  # fmt: skip


def row(name: str, turns: dict, trials: int) -> dict:
    quiet, busy = turns[name, False], turns[name, True]
    return {
        "what": name,
        "quiet": [round(s, 1) for s in quiet],
        "busy": [round(s, 1) for s in busy],
        "busy_over_quiet": paired_ratio(busy, quiet),
    }


def under(busy: bool, way) -> float:
    with busy_core() if busy else contextlib.nullcontext():
        return way()


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """One process that computes all the time, on whichever core it is put."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def quick_start(threads: int) -> float:
    """Seconds of the whole script; 0 threads for as many as are quickest."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        command = [sys.executable, "-c", QUICK_START, str(threads), "--quiet", "--output-dir", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.monotonic() - started


def searched(arguments: argparse.Namespace, model: str, **how: int | str) -> float:
    """Seconds of the trials."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "model_type": model, "use_pretrained": False, "enable_mlflow": False, "quiet": True, "pruner": "none",
            "num_optuna_trials": arguments.trials, "search_epochs": arguments.epochs, "output_dir": folder,
            "samples_per_class": arguments.samples_per_class, "sampler": "random", **how,
        }  # fmt: skip
        command = [sys.executable, "-c", SEARCHED, json.dumps(config)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        seconds, trials = json.loads(done.stdout.splitlines()[-1])
        assert trials == arguments.trials
        return seconds


if __name__ == "__main__":
    main()

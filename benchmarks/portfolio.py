"""Which settings a search should try first: a few that together do well on other maps than those that it will see.

Measured: `--settings` settings, the defaults and others, each trained from random weights for the same seconds on each
kind of maps, and scored on their test part. The others are drawn from the search space of the architecture, but about
half of their parameters, by lot, are those of the defaults: a setting that is drawn whole is hardly ever as good. From
the table a portfolio is picked greedily: after the defaults, the setting that adds most to the mean, over the kinds of
maps, of the best score in the portfolio, and where none adds anything, the best by itself. What is picked stands in
`waferlab/search/portfolio.py`. Real maps that a search is to be judged on must not be among these: here they
are those of lots with even numbers.

    python benchmarks/portfolio.py --data synthetic wm811k_even.npz --output benchmarks/results/portfolio.json

Trainings run in processes of one thread each; a call with the same output file goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import ROOT, earlier_runs, write_record
from provenance import BATCHES, FAMILY, GENERATOR, SCORES, SPLIT, TRAINING

MEASURES = (*GENERATOR, *SPLIT, *BATCHES, *TRAINING, *SCORES)  # and the families that are trained

TRAIN = """
import json, random, sys, tempfile
import optuna
import measure
from integrated_pipeline import IntegratedMLPipeline
case = json.loads(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    pipeline = IntegratedMLPipeline(measure.plain_config(
        model_type=case["model"], data=case["path"], max_samples_per_class=case["per_class"], threads=1,
        max_epochs=1000, time_limit=case["seconds"], output_dir=folder))
    pipeline.prepare_data()
    parameters = pipeline._default_trial(case["model"])
    if case["setting"]:
        sampler = optuna.samplers.RandomSampler(seed=1000 + case["setting"])
        drawn = pipeline._suggest(optuna.create_study(sampler=sampler).ask(), case["model"])
        lots = random.Random(case["setting"])
        parameters = {name: lots.choice((value, drawn[name])) for name, value in parameters.items()}
    record = pipeline.train_final_model(case["model"], parameters)
    (result,), _ = pipeline.evaluate([record])
print(json.dumps({"parameters": parameters, "macro_f1": round(result.test["macro_f1"], 4),
                  "epochs": record.epochs, "precision": record.precision}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--models", nargs="+", default=["lightning_cnn", "torchvision_resnet"])
    parser.add_argument("--settings", type=int, default=12, help="of each architecture, the defaults included")
    parser.add_argument("--seconds", type=float, default=60, help="of each training (default 60)")
    parser.add_argument("--per-class", type=int, default=150, help="maps of each class, at most")
    parser.add_argument("--size", type=int, default=4, help="of the portfolio, the defaults included")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    runs = earlier_runs(arguments.output, {})
    known = {key(run) for run in runs}
    cases = [
        {"model": model, "setting": setting, "data": Path(data).name, "path": data, "seconds": arguments.seconds,
         "per_class": arguments.per_class}
        for setting in range(arguments.settings) for model in arguments.models for data in arguments.data
    ]  # fmt: skip
    with ThreadPoolExecutor(arguments.processes) as pool:
        for run in pool.map(train, [case for case in cases if key(case) not in known]):
            runs.append(run)
            print(json.dumps(run), flush=True)
            write(arguments.output, runs, arguments.size)


def key(run: dict[str, Any]) -> tuple:
    return tuple(run[name] for name in ("model", "setting", "data", "seconds", "per_class"))


def train(case: dict[str, Any]) -> dict[str, Any]:
    """One training in a process of its own; a setting with which it diverges scores 0."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(case)], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = {"macro_f1": 0.0, "failed": done.stderr.strip().splitlines()[-1:], "precision": "none"}
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
    return {name: value for name, value in case.items() if name != "path"} | found


def pick(scores: dict[int, Sequence[float]], size: int) -> list[int]:
    """Numbers of settings, the defaults (0) first, by what each adds to the mean of the best; at most `size`.

    Args:
        scores: of each setting, one a kind of maps.
        size: of the portfolio.
    """
    chosen = [0]

    def worth(number: int) -> tuple[float, float]:
        best = [max(column) for column in zip(*(scores[n] for n in [*chosen, number]), strict=True)]
        return sum(best), sum(scores[number])

    while len(chosen) < min(size, len(scores)):
        chosen.append(max((number for number in scores if number not in chosen), key=worth))
    return chosen


def write(output: Path, runs: list[dict[str, Any]], size: int) -> None:
    picked = {}
    for model in sorted({run["model"] for run in runs}):
        table: dict[int, dict[str, float]] = {}
        for run in runs:
            if run["model"] == model:
                table.setdefault(run["setting"], {})[run["data"]] = run["macro_f1"]
        kinds = sorted({kind for row in table.values() for kind in row})
        whole = {number: [row[kind] for kind in kinds] for number, row in table.items() if len(row) == len(kinds)}
        if 0 in whole:
            parameters = {run["setting"]: run.get("parameters") for run in runs if run["model"] == model}
            picked[model] = [
                {"setting": number, "scores": whole[number], "parameters": parameters[number]}
                for number in pick(whole, size)
            ]
    # What is picked changes the registration, which moves no figure here: each run has all of its parameters.
    families = {name: [n for n in FAMILY.get(name, ()) if not n.startswith("register_model")] for name in picked}
    write_record(
        output, {"benchmark": "portfolio", "picked": picked, "runs": runs},
        measures=(*MEASURES, *(n for names in families.values() for n in names)),
        repeats="1 seed", precision=[run["precision"] for run in runs],
    )  # fmt: skip


if __name__ == "__main__":
    main()

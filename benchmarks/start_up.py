"""Where the seconds before the first result go.

Measured, each in processes of its own and in turn: `--help` of every script; importing each library alone, over a bare
interpreter; quick_start from the shell's point of view, with the seconds of its phases as its summary gives them,
"before the first line" being the imports. The files are in the disk cache (one warm-up round is thrown away).

    python benchmarks/start_up.py --output benchmarks/results/start_up.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import ROOT, take_turns, write_record
from provenance import BATCHES, FAMILY, GENERATOR, SCORES, SPLIT, TRAINING

MEASURES = (
    *GENERATOR, *SPLIT, *BATCHES, *TRAINING, *FAMILY["torchvision_resnet"], *SCORES,
    *("train_and_report", "run_pipeline", "make_parser", "make_database", "CheckpointFiles"),
    *("plot_confusion_matrix", "plot_sample_predictions", "plot_model_comparison", "plot_training_history"),
    *("write_report", "write_model_card"),
)  # fmt: skip

SCRIPTS = ("quick_start.py", "demo.py", "run_experiment.py", "predict.py")
LIBRARIES = ("torch", "torchvision.models", "lightning.pytorch", "sklearn.metrics", "matplotlib.figure", "ultralytics")
PIPELINE = "integrated_pipeline"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    scripts = [name for name in SCRIPTS if (ROOT / name).exists()]
    commands = {f"{name} --help": [name, "--help"] for name in scripts}
    commands |= {f"import {name}": ["-c", f"import {name}"] for name in (*LIBRARIES, PIPELINE)}
    commands["bare interpreter"] = ["-c", "pass"]
    ways = {name: partial(seconds, command) for name, command in commands.items()}
    take_turns(ways, repeats=1)
    turns = take_turns(ways, repeats=arguments.repeats)
    quick_starts, models = zip(*(quick_start() for _ in range(arguments.repeats)), strict=True)
    record = {"benchmark": "start_up", "repeats": arguments.repeats}
    record["seconds"] = {name: spread(values) for name, values in turns.items()}
    record["quick_start"] = {phase: spread([q[phase] for q in quick_starts]) for phase in quick_starts[0]}
    record["quick_start_test"] = [
        {
            "macro_f1": test["macro_f1"],
            "interval": test["intervals"]["macro_f1"],
            "interval_method": test["interval_method"],
            "maps": test["n_samples"],
        }
        for test in (model["test"] for model in models)
    ]
    for name, value in (record["seconds"] | record["quick_start"]).items():
        print(f"{name:32} {value['median']:6.2f} s ({value['low']:.2f} to {value['high']:.2f})")
    write_record(
        arguments.output,
        record,
        measures=MEASURES,
        repeats=f"{arguments.repeats} turns after one to warm up",
        precision=[model["precision"] for model in models],
        weights=" or ".join(sorted({model["weights"].partition(" (")[0] + " weights" for model in models})),
    )


def seconds(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - started


def quick_start() -> tuple[dict[str, float], dict]:
    """The seconds of its phases, and the record of its model."""
    with tempfile.TemporaryDirectory() as folder:
        whole = seconds(["quick_start.py", "--quiet", "--output-dir", folder])
        summary = json.loads((Path(folder) / "results/quick_start/experiment_summary.json").read_text())
    phases = {f"quick_start: {phase}": value for phase, value in summary["seconds"].items()}
    rest = {"quick_start: imports and the rest": whole - sum(phases.values())}
    return {"quick_start, whole": whole, **rest, **phases}, summary["models"][0]


def spread(values: list[float]) -> dict[str, float]:
    return {k: round(f(values), 3) for k, f in (("median", statistics.median), ("low", min), ("high", max))}


if __name__ == "__main__":
    main()

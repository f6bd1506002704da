"""Two processes of one thread, joined in one training, beside one process of one or two threads; on a CPU.

Measured, for each family: the seconds of a training of so many epochs on generated maps, the same batches in all ways,
and its macro F1 on the test part: with `devices=2`, with one device and two threads, with one device and one thread.
The ways take turns in each repeat, so that what else the machine does meets all of them. Seconds are those of the steps
and the validation; left out are imports, reading, the start of the processes and scoring.

    python benchmarks/devices.py --output benchmarks/results/devices.json

A repeat has a seed of its own, so the scores of the ways are compared seed by seed, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import as_text, paired_difference, paired_ratio, plain_config, rows, write_record
from provenance import BATCHES, FAMILIES, GENERATOR, SCORES, SPLIT, TRAINING

WAYS = {  # by name: fields of the configuration
    "one thread": {"devices": 1, "threads": 1},
    "two threads": {"devices": 1, "threads": 2},
    "two devices": {"devices": 2, "threads": 1},
}
MEASURES = (*GENERATOR, *SPLIT, *BATCHES, *TRAINING, *FAMILIES, *SCORES, "on_each_device", "SameStatistics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lightning_cnn", "torchvision_resnet",
                                                        "torchvision_efficientnet", "yolo_inspired"])  # fmt: skip
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples-per-class", type=int, default=150)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs = []
    for model in arguments.models:
        for seed in range(arguments.repeats):
            for way in WAYS:
                runs.append({"model": model, "way": way, "seed": seed, **measure(arguments, model, way, seed)})
                print(json.dumps(runs[-1]), flush=True)
    settings = {name: getattr(arguments, name) for name in ("epochs", "samples_per_class", "image_size", "batch_size")}
    write_record(
        arguments.output, {"benchmark": "devices", **settings, "outcome": outcome(runs), "runs": runs},
        measures=MEASURES, repeats=f"{arguments.repeats} seeds", precision=["32-true"],
    )  # fmt: skip


def measure(arguments: argparse.Namespace, model: str, way: str, seed: int) -> dict[str, Any]:
    """One training."""
    from integrated_pipeline import IntegratedMLPipeline

    with tempfile.TemporaryDirectory() as folder:
        pipeline = IntegratedMLPipeline(plain_config(
            model_type=model, seed=seed, max_epochs=arguments.epochs, samples_per_class=arguments.samples_per_class,
            image_size=arguments.image_size, batch_size=arguments.batch_size, accelerator="cpu", precision="32-true",
            output_dir=folder, **WAYS[way],
        ))  # fmt: skip
        pipeline.prepare_data()
        record = pipeline.train_final_model(model)
        (result,), _ = pipeline.evaluate([record])
    return {"seconds": round(record.train_seconds, 2), "macro_f1": round(result.test["macro_f1"], 4)}


def outcome(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each family: times as quick as with two threads, and the difference in macro F1 to them."""
    found = []
    for model in dict.fromkeys(run["model"] for run in runs):
        of = {way: [run for run in runs if (run["model"], run["way"]) == (model, way)] for way in WAYS}
        seconds = {way: [run["seconds"] for run in some] for way, some in of.items()}
        scores = {way: [run["macro_f1"] for run in some] for way, some in of.items()}
        quicker = {way: paired_ratio(seconds["two threads"], some) for way, some in seconds.items()}
        found.append({
            "model": model, "seconds": {way: statistics.median(some) for way, some in seconds.items()},
            "times_as_quick_as_two_threads": quicker,
            "macro_f1": {way: round(statistics.mean(some), 4) for way, some in scores.items()},
            "difference_of_two_devices": paired_difference(scores["two devices"], scores["two threads"]),
        })  # fmt: skip
    return found


def table_of_devices(record: dict[str, Any]) -> list[str]:
    """What a page says of a record."""
    cells = []
    for row in record["outcome"]:
        quick = row["times_as_quick_as_two_threads"]["two devices"]
        cells.append([
            row["model"], *(f"{row['seconds'][way]:.1f}" for way in WAYS),
            as_text(quick),
            *(f"{row['macro_f1'][way]:.3f}" for way in WAYS),
        ])  # fmt: skip
    ways = ", ".join(f"{way} (s)" for way in WAYS)
    scores = ", ".join(f"F1 with {way}" for way in WAYS)
    return rows(f"model, {ways}, two devices: times as quick as two threads, {scores}", cells)


if __name__ == "__main__":
    main()

"""How far apart the same training ends on other processors, and what ends bit for bit alike.

A process of its own for each way, with the same seed, batches and precision (32-true): twice as it is; with another
number of threads; and as on an older processor, whose vector instructions PyTorch, oneDNN and MKL are told to do
without, so that sums are made in another order and the last bits differ. That stands for two machines, which are seldom
at hand together.

    python benchmarks/processors.py --output benchmarks/results/processors.json

Compared with the first way: test macro F1, the share of test maps that get the same answer, the largest difference of a
probability.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import plain_config, rows, write_record
from provenance import BATCHES, FAMILIES, GENERATOR, SCORES, SPLIT, TRAINING

OLDER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
WAYS: dict[str, tuple[int, dict[str, str]]] = {  # by name: threads, environment
    "as it is": (2, {}),
    "again": (2, {}),
    "one thread": (1, {}),
    "older processor": (2, OLDER),
}
MEASURES = (*GENERATOR, *SPLIT, *BATCHES, *TRAINING, *FAMILIES, *SCORES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lightning_cnn", "torchvision_resnet",
                                                        "torchvision_efficientnet", "yolo_inspired"])  # fmt: skip
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples-per-class", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "THREADS", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments, *arguments.child)
        return
    found = []
    for model in arguments.models:
        found += compare(model, {way: run(arguments, model, way) for way in WAYS})
        print(*map(json.dumps, found[-len(WAYS) :]), sep="\n", flush=True)
    settings = {name: getattr(arguments, name) for name in ("epochs", "samples_per_class", "image_size")}
    write_record(
        arguments.output, {"benchmark": "processors", **settings, "rows": found}, measures=MEASURES, repeats="1 seed",
        precision=["32-true"],
    )  # fmt: skip


def run(arguments: argparse.Namespace, model: str, way: str) -> tuple[float, np.ndarray]:
    """The test macro F1 of one training in a new process, and its probabilities on the test maps."""
    threads, environment = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.npz"
        flags = [f"--{name.replace('_', '-')}={getattr(arguments, name)}"
                 for name in ("epochs", "samples_per_class", "image_size", "seed")]  # fmt: skip
        command = [sys.executable, __file__, *flags, "--child", model, str(threads), str(file)]
        subprocess.run(command, check=True, env=os.environ | environment)
        with np.load(file) as answers:
            return float(answers["macro_f1"]), answers["probabilities"]


def train(arguments: argparse.Namespace, model: str, threads: str, file: str) -> None:
    """What such a process does."""
    from integrated_pipeline import IntegratedMLPipeline

    with tempfile.TemporaryDirectory() as folder:
        pipeline = IntegratedMLPipeline(plain_config(
            model_type=model, seed=arguments.seed, max_epochs=arguments.epochs, image_size=arguments.image_size,
            samples_per_class=arguments.samples_per_class, threads=int(threads), precision="32-true",
            accelerator="cpu", output_dir=folder,
        ))  # fmt: skip
        pipeline.prepare_data()
        (result,), (predicted,) = pipeline.evaluate([pipeline.train_final_model(model)])
    np.savez(file, macro_f1=result.test["macro_f1"], probabilities=predicted.probabilities)


def compare(model: str, ends: dict[str, tuple[float, np.ndarray]]) -> list[dict[str, Any]]:
    """A row for each way, held against the first one."""
    _, first = next(iter(ends.values()))
    return [
        {
            "model": model,
            "way": way,
            "macro_f1": round(score, 4),
            "same_answer": round(float((answers.argmax(axis=1) == first.argmax(axis=1)).mean()), 4),
            "largest_difference": float(np.abs(answers - first).max()),
        }
        for way, (score, answers) in ends.items()
    ]


def table_of_processors(record: dict[str, Any]) -> list[str]:
    """What a page says of a record."""
    cells = [
        [
            row["model"], row["way"], f"{row['macro_f1']:.3f}", f"{row['same_answer']:.1%}",
            "none, bit for bit" if row["largest_difference"] == 0 else f"{row['largest_difference']:.2g}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    return rows("model, way, test F1, same answer, largest difference of a probability", cells)


if __name__ == "__main__":
    main()

"""What the benchmarks share: ways that take turns, ratios with their spread, and the record that is written."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from integrated_pipeline import IntegratedMLPipeline
    from wafer_data import Split

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def take_turns(ways: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[Any]]:
    """Calls each way in turn (A B A B ...), so that a machine that slows down slows all of them; what they returned."""
    outcomes: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            outcomes[name].append(way())
    return outcomes


def paired_ratio(numerator: list[float], denominator: list[float]) -> dict[str, Any]:
    """The ratio turn by turn: median, lowest, highest, number of turns."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "turns": len(ratios),
    }


def paired_difference(values: list[float], others: list[float]) -> dict[str, Any]:
    """The difference turn by turn: mean, 95% t interval of the mean (None for one turn), number of turns."""
    from scipy import stats

    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, n = statistics.mean(differences), len(differences)
    half = None
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return {
        "mean": round(mean, 4),
        "interval": None if half is None else [round(mean - half, 4), round(mean + half, 4)],
        "turns": n,
    }


def as_text(ratio: dict[str, Any]) -> str:
    """For the terminal: median, range and number of turns."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}, {ratio['turns']} turns)"


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Writes a record with the environment it was measured in; prints it where no path is given.

    Of the data it keeps the file's name only: where it lay is of no use to a reader.
    """
    from integrated_pipeline import environment

    if "data" in record:
        record = record | {"data": Path(record["data"]).name}
    text = json.dumps({**record, "environment": environment() | {"load_average": os.getloadavg()[0]}}, indent=1)
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        print(f"written to {path}")


def prepare(arguments: argparse.Namespace, model_type: str | list[str]) -> IntegratedMLPipeline:
    """A pipeline with its data ready, as the flags say, that trains from random weights and tracks nothing."""
    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

    config = ExperimentConfig(
        model_type=model_type,
        data=arguments.data,
        max_samples_per_class=arguments.per_class,
        use_pretrained=False,
        max_epochs=arguments.epochs,
        early_stopping_patience=arguments.epochs,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        seed=arguments.seed,
        enable_optuna=False,
        enable_mlflow=False,
        output_dir=arguments.folder,
        quiet=True,
    )
    pipeline = IntegratedMLPipeline(config)
    pipeline.prepare_data()
    return pipeline


def few_maps(pipeline: IntegratedMLPipeline, per_class: int, validation_per_class: int, *, seed: int) -> Split:
    """The pipeline's split with at most so many maps of each class to train on and to validate; test stays whole."""
    import numpy as np

    rng, labels, split = np.random.default_rng(seed), pipeline.maps.labels, pipeline.split

    def draw(part: np.ndarray, per_class: int) -> np.ndarray:
        shuffled = rng.permutation(part)
        return np.sort(np.concatenate([shuffled[labels[shuffled] == c][:per_class] for c in range(9)]))

    return replace(
        split,
        train=draw(split.train, per_class),
        validation=draw(split.validation, validation_per_class),
        fingerprint=f"{split.fingerprint}-{per_class}",
    )


def score_on(pipeline: IntegratedMLPipeline, record: dict, indices: np.ndarray) -> dict:
    """What a trained model (any record with model_type, parameters and checkpoint) scores on maps of the pipeline."""
    import evaluation
    from integrated_pipeline import predict_probabilities
    from wafer_data import CLASS_NAMES, resize_maps

    maps = pipeline.maps.select(indices)
    predicted = evaluation.Predictions(
        probabilities=predict_probabilities(pipeline.load_model(record), resize_maps(maps, pipeline.config.image_size)),
        labels=maps.labels,
        groups=maps.groups,
        class_names=CLASS_NAMES,
    )
    return evaluation.compute_metrics(predicted)


def write_image_folder(data, folder: Path) -> None:
    """Writes the training, validation and test maps of a `WaferMapDataModule` as `<part>/<class>/<n>.png`.

    The images are the resized grey maps that our own training sees, so that all ways start from the same pixels.
    """
    from PIL import Image

    from wafer_data import CLASS_NAMES

    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    for part, loader in loaders.items():
        for name in CLASS_NAMES:
            (folder / part / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(loader.dataset.images, loader.dataset.labels, strict=True)):
            Image.fromarray(image[0].numpy()).save(folder / part / CLASS_NAMES[label] / f"{i}.png")


class ClockedF1:
    """Seconds since it was made, beside the macro F1 on validation, epoch by epoch."""

    def __init__(self) -> None:
        import time

        self._clock, self.points = time.monotonic, []
        self._started = self._clock()

    def add(self, truth, predicted) -> None:
        """Notes the score of an epoch, by the definition that we use everywhere."""
        from sklearn.metrics import f1_score

        score = f1_score(truth, predicted, average="macro", labels=range(9), zero_division=0)
        self.points.append((round(self._clock() - self._started, 2), round(float(score), 4)))

    def seconds_to(self, score: float) -> float | None:
        """When `score` was first reached; None if it never was."""
        return next((seconds for seconds, value in self.points if value >= score), None)

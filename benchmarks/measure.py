"""What the benchmarks share: ways that take turns, ratios with their spread, and the record that is written."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.config import ExperimentConfig
    from waferlab.data.splitting import Split
    from waferlab.evaluation.predictions import Predictions
    from waferlab.records import TrainingRecord

from provenance import ROOT, changed, digests

sys.path.insert(0, str(ROOT))


NOT_RECORDED = "not recorded"
# Until then, a resample without a class scored 0 for it, so that the intervals of few lots lay too low.
OLD_INTERVALS = r"95% percentile bootstrap over [\d,]+ lots, \d+ resamples"


def rows(heading: str, cells: list[list[str]]) -> list[str]:
    """A Markdown table; `heading` has its columns, between commas."""
    columns = heading.split(", ")
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in cells)]


def interval_holds(method: str | None) -> bool:
    """Whether an interval over lots is one to publish: its method is recorded and not the old one."""
    return method is not None and re.fullmatch(OLD_INTERVALS, method) is None


def score_text(score: float, interval: list[float] | None, method: str | None) -> str:
    """A score, and its interval in brackets where that holds."""
    if interval is None or not interval_holds(method):
        return f"{score:.3f}"
    return f"{score:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


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


def write_record(
    path: Path | None,
    record: dict[str, Any],
    *,
    measures: Iterable[str],
    repeats: str,
    precision: Iterable[str] = (),
    weights: str | None = "random weights",
    search: str | None = "no search",
) -> None:
    """Writes a record with all that its figures depend on; prints it where no path is given.

    Of the data it keeps the file's name only: where it lay is of no use to a reader.

    Args:
        path: the JSON to write.
        record: the figures.
        measures: the definitions that could move them, as `provenance.digests` takes them.
        repeats: how often it was measured, in words: "5 seeds".
        precision: of each training, as Lightning names it.
        weights: what the trainings started from; None where nothing is trained.
        search: how parameters were chosen; None where nothing is trained.
    """
    from waferlab.records import environment

    if "data" in record:
        record = record | {"data": Path(record["data"]).name}
    training = {"repeats": repeats, "precision": sorted({*precision}), "weights": weights, "search": search}
    surroundings = environment() | {"load_average": os.getloadavg()[0]}
    made = {"training": training, "environment": surroundings, "code": digests(measures)}
    text = json.dumps(record | made, indent=1)
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        print(f"written to {path}")


def earlier_runs(output: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that the output file has from an earlier call with the same settings and the same code."""
    if output is None or not output.exists():
        return []
    record = json.loads(output.read_text())
    if {name: record.get(name) for name in settings} != settings or "code" not in record or changed(record["code"]):
        print(f"{output} has other settings or was made by other code: all of it is measured anew")
        return []
    return record["runs"]


def plain_config(**settings: Any) -> ExperimentConfig:
    """Random weights, no search, no tracking, nothing printed, all epochs trained, unless `settings` say otherwise."""
    from integrated_pipeline import ExperimentConfig  # which registers the architectures

    plain = {"use_pretrained": False, "enable_optuna": False, "enable_mlflow": False, "quiet": True}
    if "max_epochs" in settings:
        plain["early_stopping_patience"] = settings["max_epochs"]
    return ExperimentConfig(**plain | settings)


def prepare(arguments: argparse.Namespace, model_type: str | list[str]) -> IntegratedMLPipeline:
    """A pipeline with its data ready, as the flags say, that trains from random weights and tracks nothing."""
    from integrated_pipeline import IntegratedMLPipeline

    config = plain_config(
        model_type=model_type,
        data=arguments.data,
        max_samples_per_class=arguments.per_class,
        max_epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        precision=arguments.precision,
        seed=arguments.seed,
        output_dir=arguments.folder,
    )
    pipeline = IntegratedMLPipeline(config)
    pipeline.prepare_data()
    return pipeline


def few_maps(
    pipeline: IntegratedMLPipeline, per_class: int | None, validation_per_class: int | None, *, seed: int
) -> Split:
    """The pipeline's split with at most so many maps of each class to train on and to validate, or all of them (None).

    The test part stays whole. Of one seed, fewer training maps are some of the more.
    """
    import numpy as np

    rng, labels, split = np.random.default_rng(seed), pipeline.maps.labels, pipeline.split

    def draw(part: np.ndarray, per_class: int | None) -> np.ndarray:
        shuffled = rng.permutation(part)
        return np.sort(np.concatenate([shuffled[labels[shuffled] == c][:per_class] for c in range(9)]))

    return replace(
        split,
        train=draw(split.train, per_class),
        validation=draw(split.validation, validation_per_class),
        fingerprint=f"{split.fingerprint}-{per_class}",
    )


def score_on(pipeline: IntegratedMLPipeline, record: TrainingRecord, indices: np.ndarray) -> dict:
    """What a trained model scores on maps of the pipeline.

    As `compute_metrics`, and `macro_f1_odd_groups` beside it.
    """
    from waferlab.data.images import resize_maps
    from waferlab.data.maps import CLASS_NAMES
    from waferlab.evaluation.inference import predict_probabilities
    from waferlab.evaluation.metrics import compute_metrics
    from waferlab.evaluation.predictions import Predictions

    maps = pipeline.maps.select(indices)
    predicted = Predictions(
        probabilities=predict_probabilities(pipeline.load_model(record), resize_maps(maps, pipeline.config.image_size)),
        labels=maps.labels,
        groups=maps.groups,
        class_names=CLASS_NAMES,
    )
    odd = {"macro_f1_odd_groups": odd_groups_macro_f1(pipeline, predicted, indices)}
    return compute_metrics(predicted) | odd


def odd_groups_macro_f1(pipeline: IntegratedMLPipeline, predicted: Predictions, indices: np.ndarray) -> float | None:
    """Macro F1 on those of the maps `indices` whose `group` in the .npz is odd; None where there are no such numbers.

    The map generator was tuned on the real maps with even numbers, so networks that start from generated maps are
    better there than on maps that nobody has looked at.
    """
    import numpy as np
    from sklearn.metrics import f1_score

    path = Path(pipeline.config.data)
    if path.suffix != ".npz":
        return None
    with np.load(path, allow_pickle=False) as file:  # as the file has them, whatever numbers the pipeline gives lots
        groups = file["group"] if "group" in file.files else np.empty(0)
    if len(groups) != len(pipeline.maps) or not np.issubdtype(groups.dtype, np.integer):
        return None
    odd = groups[indices] % 2 == 1
    if not odd.any():
        return None
    truth, answers = predicted.labels[odd], predicted.predicted[odd]
    return round(float(f1_score(truth, answers, average="macro", labels=np.unique(truth), zero_division=0)), 4)


def against_ours(turns: dict[str, list[dict]]) -> dict[str, Any]:
    """Ways to train, of which one is "ours": seconds over ours to finish, and to the macro F1 that all reach.

    Args:
        turns: for each way its turns, each with `seconds` and `curve`, pairs of seconds and validation macro F1.

    Returns:
        level, that macro F1; runs, the turns; and for each other way its two ratios.
    """
    level = min(max(score for _, score in run["curve"]) for runs in turns.values() for run in runs)
    ends = {way: [run["seconds"] for run in runs] for way, runs in turns.items()}
    reached = {
        way: [next(seconds for seconds, score in run["curve"] if score >= level) for run in runs]
        for way, runs in turns.items()
    }
    row: dict[str, Any] = {"level": level, "runs": turns}
    for way in [way for way in turns if way != "ours"]:
        row[way] = {
            "seconds_to_finish_over_ours": (finish := paired_ratio(ends[way], ends["ours"])),
            "seconds_to_level_over_ours": (same := paired_ratio(reached[way], reached["ours"])),
        }
        print(f"{way} over ours: to finish {as_text(finish)}, to macro F1 {level:.3f} {as_text(same)}")
    return row


def take_warm_turns(ways: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[Any]]:
    """As `take_turns`, after one turn that is thrown away, where there is more than one to come."""
    if repeats > 1:
        take_turns(ways, repeats=1)  # the first time, torch picks kernels and the disk cache is cold
    return take_turns(ways, repeats=repeats)


def repeats_in_words(repeats: int) -> str:
    """What `take_warm_turns` does, for the record."""
    return f"{repeats} turns after one to warm up" if repeats > 1 else "1 turn, not warmed up"


def write_image_folder(data, folder: Path) -> None:
    """Writes the training, validation and test maps of a `WaferMapDataModule` as `<part>/<class>/<n>.png`.

    The images are the resized grey maps that our own training sees, so that all ways start from the same pixels.
    """
    from PIL import Image

    from waferlab.data.maps import CLASS_NAMES

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

"""Predictions in; metrics, intervals, comparisons, figures and ``experiment_summary.json`` out.

Nothing here trains a model or loads data, so every function can be tried on a handful of made-up numbers:

    predictions = Predictions(probabilities, labels, groups, class_names)
    metrics = compute_metrics(predictions)                 # a plain dict, ready for JSON
    plot_confusion_matrix(predictions, path="confusion_matrix.png")
    write_summary("experiment_summary.json", {"metrics": metrics})

Two rules hold throughout. Metrics follow scikit-learn's definitions over the classes of which the scored maps hold at
least one: nothing can be said of how well a class without maps is found, so it is named, has no score, and is in no
average. Intervals come from leaving out *lots*: wafers of one lot share their process history and therefore their
errors, and taking single maps for independent would make intervals too narrow.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

SUMMARY_SCHEMA_VERSION = 1
N_CALIBRATION_BINS = 15
BOUNDED_METRICS = ("accuracy", "macro_f1", "balanced_accuracy")  # shares and means of shares: 1 is the best
INTERVAL_METRICS = (*BOUNDED_METRICS, "expected_calibration_error")

# Okabe & Ito's palette, told apart with every common form of colour blindness: https://jfly.uni-koeln.de/color/
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
INK, MUTED, GRID = "#222222", "#6B7280", "#E2E5EA"
PASS_COLOUR, FAIL_COLOUR, WAFER_COLOUR = "#B9CBDD", "#C8371B", "#8A94A3"
TRAIN_LINE = (0, (4, 2))  # dashes; validation is solid
DPI = 150


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model said about a set of wafer maps, and the truth.

    Attributes:
        probabilities: float64 [N, C] in 0..1, rows sum to 1.
        labels: int64 [N], the true class of each map, 0..C-1.
        groups: int64 [N], the lot each map comes from.
        class_names: C names in the order of the columns of ``probabilities``.

    Raises:
        ValueError: if shapes disagree, there is no map, or a value is out of its range.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        probabilities = np.asarray(self.probabilities, dtype=np.float64)
        names = tuple(str(name) for name in self.class_names)
        if probabilities.ndim != 2 or probabilities.shape[0] == 0 or probabilities.shape[1] != len(names):
            raise ValueError(
                f"probabilities have shape {probabilities.shape}; expected [N, {len(names)}]: at least one map "
                f"and one column for each of the {len(names)} class names"
            )
        if len(set(names)) != len(names):
            raise ValueError(f"class_names must differ from each other, got {names}")
        n_samples, n_classes = probabilities.shape
        _check_probabilities(probabilities)
        labels = _as_integers(self.labels, name="labels", length=n_samples)
        if labels.min() < 0 or labels.max() >= n_classes:
            raise ValueError(f"labels are {labels.min()}..{labels.max()}: {n_classes} classes are 0..{n_classes - 1}")
        # The dataclass is frozen so that nobody edits results; normalising on construction is the one exception.
        object.__setattr__(self, "probabilities", probabilities)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "groups", _as_integers(self.groups, name="groups", length=n_samples))
        object.__setattr__(self, "class_names", names)

    @property
    def predicted(self) -> np.ndarray:
        """int64 [N], the most probable class of each map."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """float64 [N] in 1/C..1, the probability of the predicted class."""
        return self.probabilities.max(axis=1)

    def confusion(self) -> np.ndarray:
        """int64 [C, C], number of maps with true class (row) and predicted class (column)."""
        n_classes = len(self.class_names)
        cells = self.labels * n_classes + self.predicted
        return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def _check_probabilities(probabilities: np.ndarray) -> None:
    """Refuses anything that is not a distribution in each row, naming the first offender."""
    # NaN fails every comparison, so asking what is good (and negating) also catches it.
    good = (probabilities >= -1e-6).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1.0) <= 1e-3)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"row {row} of probabilities is {np.round(probabilities[row], 4).tolist()} (sum "
            f"{probabilities[row].sum():.4g}): each row must be 0..1 and sum to 1. Apply softmax to logits first."
        )


def _as_integers(values: Any, *, name: str, length: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (length,) or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {length} integers, one a map; got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def compute_metrics(predictions: Predictions) -> dict[str, Any]:
    """Scores with 95% intervals, as a dict that goes into JSON as it is (no NaN, no NumPy types).

    Definitions are scikit-learn's, over the classes of which there is at least one map: macro F1 is
    ``f1_score(labels=<those classes>, average="macro", zero_division=0)``, balanced accuracy their mean recall. The
    expected calibration error is that of Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv
    1706.04599), with 15 equal-width bins of confidence.

    Intervals are t intervals with the standard error of the jackknife that leaves out one lot at a time (MacKinnon,
    Nielsen & Webb 2023, "Fast and reliable jackknife and bootstrap methods for cluster-robust inference", J. Appl.
    Econometrics 38), on the arcsine scale, so that they stay within 0..1. Degrees of freedom: lots less one; of a
    class, those that hold it less one. Percentile intervals of the bootstrap hold the truth far less often where a
    class lives in few lots: ``benchmarks/interval_coverage.py`` measures both. Nothing is drawn at random.

    Returns:
        accuracy, macro_f1, balanced_accuracy, roc_auc_ovr (None with roc_auc_ovr_note if a class is absent),
        expected_calibration_error; intervals {metric: [low, high], or None if all maps are of one lot}; per_class
        {name: precision, recall, f1, support, f1_interval}: f1_interval None where fewer than two lots hold the class,
        and all but support (0) None where no map does; confusion_matrix (rows: true); n_samples, n_groups,
        interval_method.
    """
    lot_confusion, lot_gaps = _lot_statistics(predictions)
    n_groups = len(lot_confusion)
    scores = _scores(lot_confusion.sum(axis=0), lot_gaps.sum(axis=0))
    lots_with_class = (lot_confusion.sum(axis=2) > 0).sum(axis=0)
    roc_auc, roc_auc_note = _roc_auc_ovr(predictions)

    intervals: dict[str, list[float] | None] = dict.fromkeys(INTERVAL_METRICS)
    f1_intervals = np.empty((0, 2))
    method = "none: all maps come from a single lot, so nothing is known about how scores vary between lots"
    if n_groups > 1:
        without = _scores_without_each_lot(lot_confusion, lot_gaps)
        intervals = {
            name: _score_interval(scores[name], without[name], n_lots=n_groups).tolist() for name in BOUNDED_METRICS
        }
        error = "expected_calibration_error"
        intervals[error] = _calibration_interval(float(scores[error]), without[error])
        f1_intervals = _score_interval(scores["f1"], without["f1"], n_lots=lots_with_class)
        method = f"95% jackknife over {n_groups} lots, each left out in turn: t interval on the arcsine scale"

    per_class = {
        name: {
            **{metric: _known(scores[metric][index], support) for metric in ("precision", "recall", "f1")},
            "support": int(support),
            "f1_interval": f1_intervals[index].tolist() if lots_with_class[index] > 1 else None,
        }
        for index, (name, support) in enumerate(zip(predictions.class_names, scores["support"], strict=True))
    }
    return {
        **{name: float(scores[name]) for name in INTERVAL_METRICS},
        "roc_auc_ovr": roc_auc,
        "roc_auc_ovr_note": roc_auc_note,
        "intervals": intervals,
        "per_class": per_class,
        "confusion_matrix": predictions.confusion().tolist(),
        "n_samples": len(predictions.labels),
        "n_groups": n_groups,
        "interval_method": method,
    }


def _known(score: float, support: float) -> float | None:
    """A class's score; None if there is no map of it: 0 would say that it was never found."""
    return float(score) if support > 0 else None


def compare_macro_f1(new: Predictions, old: Predictions) -> dict[str, Any]:
    """Two models on the same maps: the difference in macro F1 with its 95% interval.

    The jackknife of `compute_metrics` on the difference itself: what makes a lot hard for both models cancels out. A
    plain t interval, as differences lie far from their bounds. Where no lot tells the models apart, the share of lots
    that would is still only known to lie below ``1 - 0.05 ** (1 / lots)``, and so is the difference.

    Returns:
        new, old, difference (new - old); interval [low, high] within -1..1, all of it for maps of a single lot;
        n_groups, the number of lots; interval_method.

    Raises:
        ValueError: the two were not made on the same maps.
    """
    same = np.array_equal(new.labels, old.labels) and np.array_equal(new.groups, old.groups)
    if not same or new.class_names != old.class_names:
        raise ValueError("the two predictions are not of the same maps: labels, lots or class names differ")
    by_lot = [_lot_statistics(p) for p in (new, old)]
    scores = [float(_scores(*(sums.sum(axis=0) for sums in lots))["macro_f1"]) for lots in by_lot]
    n_lots, difference, half = len(np.unique(new.groups)), scores[0] - scores[1], math.inf
    method = "none: all maps come from a single lot, so any difference is possible"
    if n_lots > 1:
        without = [_scores_without_each_lot(*lots)["macro_f1"] for lots in by_lot]
        error = _jackknife_error(difference, without[0] - without[1])
        half = float(_t_quantile(n_lots) * error if error > 1e-12 else 1 - _share_at_least(n_lots))
        method = f"95% paired jackknife over {n_lots} lots, each left out in turn: t interval"
    return {
        "new": scores[0],
        "old": scores[1],
        "difference": difference,
        "interval": [max(-1.0, difference - half), min(1.0, difference + half)],
        "n_groups": n_lots,
        "interval_method": method,
    }


def _lot_statistics(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Adds up, lot by lot, all that the metrics need: leaving out a lot is then one subtraction.

    Returns:
        Confusion matrices float64 [G, C, C], and float64 [G, 15]: in each confidence bin the sum of
        (correct - confidence), whose total over lots is the bin's calibration gap times its number of maps.
    """
    lots, lot = np.unique(predictions.groups, return_inverse=True)
    n_lots, n_classes = len(lots), len(predictions.class_names)
    predicted, confidence = predictions.predicted, predictions.confidence

    cells = (lot * n_classes + predictions.labels) * n_classes + predicted
    confusion = np.bincount(cells, minlength=n_lots * n_classes**2).reshape(n_lots, n_classes, n_classes)

    # Guo's bins are open on the left: a confidence of exactly 1 belongs to the last bin.
    bins = np.clip(np.ceil(confidence * N_CALIBRATION_BINS).astype(np.int64) - 1, 0, N_CALIBRATION_BINS - 1)
    gap = (predicted == predictions.labels) - confidence
    gaps = np.bincount(lot * N_CALIBRATION_BINS + bins, weights=gap, minlength=n_lots * N_CALIBRATION_BINS)
    return confusion.astype(np.float64), gaps.reshape(n_lots, N_CALIBRATION_BINS)


def _scores(confusion: np.ndarray, gaps: np.ndarray) -> dict[str, np.ndarray]:
    """All scores from confusion matrices [..., C, C] and bin gaps [..., 15]; 0/0 is 0, as ``zero_division=0``.

    Averages are over the classes with maps, of these confusion matrices: the others add 0 to a sum of F1 or recall.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, called = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total, n_present = support.sum(axis=-1), (support > 0).sum(axis=-1)
    recall = _divide(hits, support)
    f1 = _divide(2 * hits, support + called)
    return {
        "precision": _divide(hits, called),
        "recall": recall,
        "f1": f1,
        "support": support,
        "accuracy": hits.sum(axis=-1) / total,
        "macro_f1": f1.sum(axis=-1) / n_present,
        "balanced_accuracy": recall.sum(axis=-1) / n_present,
        "expected_calibration_error": np.abs(gaps).sum(axis=-1) / total,
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator > 0)


def _scores_without_each_lot(lot_confusion: np.ndarray, lot_gaps: np.ndarray) -> dict[str, np.ndarray]:
    """Scores with one lot left out, arrays [G, ...], a row for each of two or more lots."""
    return _scores(lot_confusion.sum(axis=0) - lot_confusion, lot_gaps.sum(axis=0) - lot_gaps)


def _jackknife_error(value: float | np.ndarray, without: np.ndarray) -> np.ndarray:
    """Standard error [...] of a value [...] from its values without each lot in turn [G, ...].

    Spread is taken around the value itself, which is never less than around the mean.
    """
    n_lots = len(without)
    return np.sqrt((n_lots - 1) / n_lots * ((without - value) ** 2).sum(axis=0))


def _score_interval(score: np.ndarray, without: np.ndarray, *, n_lots: int | np.ndarray) -> np.ndarray:
    """95% intervals [..., 2] of scores [...] in 0..1, from the scores without each lot [G, ...].

    Args:
        score: of all lots.
        without: of all lots but one.
        n_lots: [...], that a score is known from; the interval is without meaning below two.
    """
    angle, angles = (np.arcsin(np.sqrt(np.clip(values, 0, 1))) for values in (score, without))
    half = _t_quantile(np.maximum(n_lots, 2)) * _jackknife_error(angle, angles)
    ends = np.sin(np.clip([angle - half, angle + half], 0, np.pi / 2)) ** 2
    # All right, or all wrong, in every lot: there is no spread to go by, but so few lots prove only so much.
    share = _share_at_least(np.maximum(n_lots, 1))
    low = np.where(score >= 1, share, np.minimum(ends[0], score))
    high = np.where(score <= 0, 1 - share, np.maximum(ends[1], score))
    return np.stack([low, high], axis=-1)


def _calibration_interval(error: float, without: np.ndarray) -> list[float]:
    """95% interval of a calibration error: a t interval, lengthened downwards by the jackknife's estimate of the bias.

    Chance alone gives every bin a gap, so the error measured on few maps is too large on average (Quenouille 1956,
    "Notes on bias in estimation", Biometrika 43).
    """
    n_lots = len(without)
    bias = max(0.0, (n_lots - 1) * (float(without.mean()) - error))
    half = float(_t_quantile(n_lots) * _jackknife_error(error, without))
    return [max(0.0, error - bias - half), min(1.0, error + half)]


def _t_quantile(n_lots: int | np.ndarray) -> np.ndarray:
    """Of Student's t with one degree of freedom less than lots, for 95% in the middle."""
    from scipy.special import stdtrit  # here, because scipy is slow to import

    return stdtrit(np.asarray(n_lots) - 1.0, 0.975)


def _share_at_least(n_lots: int | np.ndarray) -> np.ndarray:
    """With 95% confidence, the least share of lots that is like n lots which are all alike.

    If a smaller share were, n lots in a row would be so in less than 5% of samples (Clopper & Pearson 1934, Biometrika
    26; the rule of three).
    """
    return 0.05 ** (1 / np.asarray(n_lots))


def _roc_auc_ovr(predictions: Predictions) -> tuple[float | None, str | None]:
    """Macro one-vs-rest area under the ROC curve, or None and the reason why it does not exist."""
    from sklearn.metrics import roc_auc_score  # here, because this import costs more than all the rest of the module

    present = np.bincount(predictions.labels, minlength=len(predictions.class_names)) > 0
    absent = [name for name, here in zip(predictions.class_names, present, strict=True) if not here]
    if absent:
        return None, f"undefined: no map of class {', '.join(absent)}"
    if len(predictions.class_names) == 1:
        return None, "undefined: there is only one class"
    columns = enumerate(predictions.probabilities.T)
    return float(np.mean([roc_auc_score(predictions.labels == index, column) for index, column in columns])), None


def write_per_class_table(metrics: Mapping[str, Any], *, path: str | os.PathLike[str]) -> Path:
    """Writes what `compute_metrics` returned as CSV, one class a row.

    An interval that does not exist stays empty; scores of a class without maps are a dash.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "support", "precision", "recall", "f1", "f1_low", "f1_high"])
    for name, row in metrics["per_class"].items():
        scores = [format_number(row[key], "{:.4f}") for key in ("precision", "recall", "f1")]
        ends = ["", ""] if row["f1_interval"] is None else [f"{end:.4f}" for end in row["f1_interval"]]
        writer.writerow([name, row["support"], *scores, *ends])
    return write_atomically(path, text.getvalue().encode())


def comparison_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The final table for the terminal; the best macro F1 in bold, what was not measured as a dash.

    Args:
        results: a dict for each model with model_type and any of accuracy, macro_f1, macro_f1_interval,
            n_parameters, train_seconds, latency_ms.
    """
    # Compact enough for 80 columns with the longest of our model names.
    table = Table(title="Model comparison", box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("Model", overflow="fold")
    for heading in ("Accuracy", "Macro F1\n[95% interval]", "Params", "Time\n(s)", "Latency\n(ms)"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    best = max((result["macro_f1"] for result in results if result.get("macro_f1") is not None), default=None)
    for result in results:
        macro_f1, interval = result.get("macro_f1"), result.get("macro_f1_interval")
        bounds = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        cells = [
            str(result["model_type"]),
            format_number(result.get("accuracy"), "{:.3f}"),
            format_number(macro_f1, "{:.3f}") + bounds,
            format_number(result.get("n_parameters"), "{:.3g}M", factor=1e-6),
            format_number(result.get("train_seconds"), "{:,.0f}"),
            format_number(result.get("latency_ms"), "{:,.2f}"),
        ]
        # Text, because rich would read brackets in a plain string, as in "resnet[small]", as markup.
        table.add_row(*map(Text, cells), style="bold" if best is not None and macro_f1 == best else None)
    return table


def comparison_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The same table as `comparison_table` in Markdown, for pages that render it."""
    headings = ("Model", "Accuracy", "Macro F1 [95% interval]", "Parameters", "Training (s)", "Latency (ms)")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for result in results:
        interval = result.get("macro_f1_interval")
        bounds = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        cells = [
            str(result["model_type"]),
            format_number(result.get("accuracy"), "{:.3f}"),
            format_number(result.get("macro_f1"), "{:.3f}") + bounds,
            format_number(result.get("n_parameters"), "{:,}"),
            format_number(result.get("train_seconds"), "{:,.0f}"),
            format_number(result.get("latency_ms"), "{:,.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_number(value: float | None, form: str, *, factor: float = 1) -> str:
    """A number as text; a dash where there is none."""
    return "-" if value is None else form.format(value * factor)


def write_summary(path: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Writes ``experiment_summary.json`` whole or not at all, with `SUMMARY_SCHEMA_VERSION` as schema_version.

    NumPy scalars and arrays, tuples, dataclasses and paths are turned into what JSON knows.

    Raises:
        ValueError: if a number is NaN or infinite (JSON has neither); names the place, such as ``models[0].macro_f1``.
        TypeError: if a value has no counterpart in JSON; names the place.
    """
    plain = _to_json(summary, place="")
    document = {"schema_version": SUMMARY_SCHEMA_VERSION} | plain | {"schema_version": SUMMARY_SCHEMA_VERSION}
    return write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def _to_json(value: Any, *, place: str) -> Any:
    """The value in JSON's own types; ``place`` is the key path so far, for error messages."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place} is {value}, which JSON cannot hold: use None and say why beside it")
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item, place=f"{place}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, place=f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{place} is a {type(value).__name__}, which has no form in JSON: convert it before writing")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Replaces the file in one step, so that a crash leaves the old content, never half of the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace cannot cross disks
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def plot_confusion_matrix(
    predictions: Predictions, *, path: str | os.PathLike[str], title: str = "Confusion matrix"
) -> Path:
    """Draws counts and shares of the true class side by side (PNG); rows are true, columns predicted classes."""
    counts = predictions.confusion()
    shares = _divide(counts, np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape))
    side = float(np.clip(0.6 * len(counts), 3.6, 14))  # inches
    figure = new_figure(2 * side + 2.4, side + 1.8, title)
    left, right = figure.subplots(1, 2)
    names = [shorten(name, 32) for name in predictions.class_names]
    # Shaded by logarithm, or the commonest class would hide all others; half a map keeps empty cells at the pale end.
    scale = LogNorm(vmin=0.5, vmax=max(2, counts.max()))
    _draw_matrix(left, counts, names, form="{:,.0f}", image=left.imshow(np.maximum(counts, 0.5), "Blues", norm=scale))
    _draw_matrix(right, shares, names, form="{:.2f}", image=right.imshow(shares, "Blues", vmin=0, vmax=1))
    left.set_title(f"Number of maps ({counts.sum():,} in all, shaded on a log scale)", fontsize=11.5, color=INK)
    right.set_title("Share of each true class (diagonal: recall)", fontsize=11.5, color=INK)
    return save(figure, path)


def _draw_matrix(axes: Axes, values: np.ndarray, names: Sequence[str], *, form: str, image: AxesImage) -> None:
    """Writes the labels, and the numbers in black or white, whichever stands out from the cell's shade."""
    size = 9.0 if len(names) <= 20 else 6.0
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("Predicted class", color=INK, fontsize=11)
    axes.set_ylabel("True class", color=INK, fontsize=11)
    axes.tick_params(length=0, labelsize=size + 1)
    axes.spines[:].set_color(GRID)
    shade = image.norm(image.get_array())
    for row, column in np.argwhere(values > 0):  # empty cells stay empty: the eye finds the errors at once
        colour = "white" if shade[row, column] > 0.6 else INK
        axes.text(column, row, form.format(values[row, column]), ha="center", va="center", fontsize=size, color=colour)


def plot_sample_predictions(
    wafer_maps: Sequence[np.ndarray],
    predictions: Predictions,
    *,
    path: str | os.PathLike[str],
    title: str = "Sample predictions",
    seed: int = 0,
) -> Path:
    """Draws up to 12 wafers that the model got right, one of each class first, and its 12 most confident errors (PNG).

    Args:
        wafer_maps: N maps in the order of the predictions, uint8 [h, w], 0 no die / 1 pass / 2 fail, any sizes.
        predictions: of the same maps.
        path: the PNG to write.
        title: the figure's title.
        seed: chooses among the right ones.

    Raises:
        ValueError: if the number of maps is not the number of predictions.
    """
    if len(wafer_maps) != len(predictions.labels):
        raise ValueError(f"{len(wafer_maps)} wafer maps for {len(predictions.labels)} predictions: pass one for each")
    n_columns, tile_width, tile_height, header, heading = 6, 2.1, 2.5, 0.8, 0.45  # sizes in inches
    right, wrong = _pick_samples(predictions, limit=2 * n_columns, seed=seed)
    n_right = int((predictions.predicted == predictions.labels).sum())
    n_wrong = len(predictions.labels) - n_right
    sections = (
        (f"Right: {len(right)} of {n_right:,}" if right else "Right: none", PALETTE[0], right),
        (f"Wrong: {len(wrong)} of {n_wrong:,}, most confident first" if wrong else "Wrong: none", FAIL_COLOUR, wrong),
    )
    n_rows = sum(math.ceil(len(chosen) / n_columns) for _, _, chosen in sections)
    width, height = n_columns * tile_width + 0.3, header + 2 * heading + n_rows * tile_height + 0.1

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    # One sheet measured in inches, y downwards, for all wafers: two dozen axes would take much longer to draw.
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    sheet.set_axis_off()
    sheet.text(0.25, 0.4, title, fontsize=16, fontweight="bold", color=INK, va="center")
    dies = [Patch(color=PASS_COLOUR, label="die passed"), Patch(color=FAIL_COLOUR, label="die failed")]
    place = {"loc": "center right", "bbox_to_anchor": (width - 0.1, 0.4), "bbox_transform": sheet.transData}
    sheet.legend(handles=dies, ncols=2, frameon=False, fontsize=10, **place)
    top = header
    for text, colour, chosen in sections:
        sheet.text(0.25, top + 0.12, text, fontsize=12, fontweight="bold", color=colour, va="center")
        top += heading
        for position, index in enumerate(chosen):
            row, column = divmod(position, n_columns)
            x, y = 0.15 + (column + 0.5) * tile_width, top + row * tile_height + 0.85
            _draw_wafer(sheet, np.asarray(wafer_maps[index]), x=x, y=y, radius=0.83)
            _caption_wafer(sheet, predictions, index, x=x, y=y + 1.03, colour=colour)
        top += math.ceil(len(chosen) / n_columns) * tile_height
    return save(figure, path)


def _pick_samples(predictions: Predictions, *, limit: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of right predictions (one of each class, then a second, ...) and of the most confident errors."""
    hit = predictions.predicted == predictions.labels
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(hit))
    by_class = [shuffled[predictions.labels[shuffled] == label] for label in range(len(predictions.class_names))]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_class))
    right = [int(index) for index in turns if index is not None][:limit]
    errors = np.flatnonzero(~hit)
    wrong = errors[np.argsort(-predictions.confidence[errors], kind="stable")][:limit]
    return right, wrong.tolist()


def _draw_wafer(sheet: Axes, wafer_map: np.ndarray, *, x: float, y: float, radius: float) -> None:
    """A round wafer with its dies as cells: dies are rarely square, so rows and columns are stretched to the circle."""
    sheet.add_patch(Circle((x, y), radius * 1.04, facecolor="none", edgecolor=WAFER_COLOUR, linewidth=0.9))
    extent = (x - radius, x + radius, y + radius, y - radius)
    sheet.imshow(_wafer_image(wafer_map), extent=extent, aspect="auto", interpolation="antialiased", zorder=2)


def _wafer_image(wafer_map: np.ndarray, *, pixels: int = 400) -> np.ndarray:
    """RGBA picture of a map, uint8 [pixels, pixels, 4]: transparent off the dies and, if large, between them."""
    rows, columns = np.flatnonzero(wafer_map.any(axis=1)), np.flatnonzero(wafer_map.any(axis=0))
    if len(rows):  # some sources pad their maps; the circle is that of the dies
        wafer_map = wafer_map[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    colours = np.zeros((3, 4), dtype=np.uint8)
    for value, colour in ((1, PASS_COLOUR), (2, FAIL_COLOUR)):
        colours[value] = [*bytes.fromhex(colour[1:]), 255]
    y, x = (((np.arange(pixels) + 0.5) * size / pixels) for size in wafer_map.shape)
    image = colours[wafer_map[np.ix_(y.astype(np.int64), x.astype(np.int64))]]
    if max(wafer_map.shape) <= 64:  # streets between smaller dies would be thinner than a pixel of the figure
        image[np.abs(y % 1 - 0.5) > 0.43] = 0
        image[:, np.abs(x % 1 - 0.5) > 0.43] = 0
    return image


def _caption_wafer(sheet: Axes, predictions: Predictions, index: int, *, x: float, y: float, colour: str) -> None:
    names, confidence = predictions.class_names, predictions.confidence[index]
    share = ">99%" if confidence > 0.995 else f"{confidence:.0%}"  # a rounded 100% would claim certainty
    lines = (
        (f"true {shorten(names[predictions.labels[index]], 18)}", INK),
        (f"predicted {shorten(names[predictions.predicted[index]], 18)}", colour),
        (f"confidence {share}", MUTED),
    )
    for number, (line, shade) in enumerate(lines):
        sheet.text(x, y + 0.17 * number, line, fontsize=9, color=shade, ha="center", va="center")


def plot_model_comparison(
    results: Sequence[Mapping[str, Any]],
    *,
    path: str | os.PathLike[str],
    title: str = "Model comparison",
    error_bars: str = "95% interval over lots",
) -> Path:
    """Draws macro F1 with error bars, training time, parameters and latency of each model (PNG).

    Args:
        results: a dict for each model with model_type and any of macro_f1, macro_f1_interval ([low, high] or None),
            train_seconds, n_parameters, latency_ms. What is missing is drawn as "not measured".
        path: the PNG to write.
        title: the figure's title.
        error_bars: what ``macro_f1_interval`` is, for the reader.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError("results are empty: pass a dict for at least one model")
    figure = new_figure(14.5, 2.2 + 0.66 * len(results), title)
    score, *costs = figure.subplots(1, 4, sharey=True, width_ratios=[1.5, 1, 1, 1])
    _draw_scores(score, results, error_bars)
    _draw_costs(costs[0], results, "train_seconds", label="Training time (s)", form=" {:,.1f}")
    _draw_costs(costs[1], results, "n_parameters", label="Parameters (millions)", form=" {:,.2f}", factor=1e-6)
    _draw_costs(costs[2], results, "latency_ms", label="Latency (ms per map)", form=" {:,.2f}")
    names = [wrap_name(str(result["model_type"]), 30) for result in results]
    score.set_yticks(range(len(results)), names, fontsize=11)
    margin = 0.6 if len(results) > 1 else 0.9
    score.set_ylim(len(results) - 1 + margin, -margin)  # first model on top
    return save(figure, path)


def _draw_scores(axes: Axes, results: Sequence[Mapping[str, Any]], error_bars: str) -> None:
    """Dots, not bars: a bar must start at zero, and there the differences that matter could not be seen."""
    ends, label = [], "Macro F1"
    for row, (result, colour) in enumerate(zip(results, model_colours(len(results)), strict=True)):
        value, interval = result.get("macro_f1"), result.get("macro_f1_interval")
        if value is None:
            centre = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center"}
            axes.text(0.5, row, "not measured", fontsize=10, color=MUTED, **centre)
            continue
        if interval is not None:
            # Drawn as a line from low to high: an interval over seeds need not contain the value itself.
            axes.plot(interval, [row, row], "-|", color=colour, linewidth=2.5, markersize=11, markeredgewidth=2.5)
            label = f"Macro F1\nerror bars: {error_bars}"
        axes.plot(value, row, "o", color=colour, markersize=9)
        above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.3f}", (value, row), fontsize=10, color=INK, **above)
        ends += [value, *(() if interval is None else interval)]
    if ends:
        margin = max(0.04, 0.12 * (max(ends) - min(ends)))
        axes.set_xlim(max(-0.02, min(ends) - margin), min(1.02, max(ends) + margin))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))  # more labels than that touch each other
    style(axes, label, grid="x")


def _draw_costs(
    axes: Axes, results: Sequence[Mapping[str, Any]], key: str, *, label: str, form: str, factor: float = 1.0
) -> None:
    lengths = [(result.get(key) or 0.0) * factor for result in results]
    axes.barh(range(len(results)), lengths, height=0.55, color=model_colours(len(results)))
    for row, (result, length) in enumerate(zip(results, lengths, strict=True)):
        known = result.get(key) is not None
        text = form.format(length) if known else " not measured"
        axes.text(length, row, text, va="center", fontsize=10, color=INK if known else MUTED)
    axes.set_xlim(0, 1.35 * (max(lengths) or 1.0))  # leaves room for the longest bar's number
    style(axes, label, grid="x")
    axes.tick_params(axis="y", length=0, labelleft=False)


def plot_training_history(
    histories: Mapping[str, Mapping[str, Sequence[float | None]]],
    *,
    path: str | os.PathLike[str],
    title: str = "Training history",
) -> Path:
    """Draws loss, macro F1 and, where recorded, the learning rate against the epoch (PNG).

    Args:
        histories: for each model a dict with epoch and any of train_loss, val_loss, train_macro_f1, val_macro_f1,
            learning_rate, each as long as epoch; None or NaN leaves a gap.
        path: the PNG to write.
        title: the figure's title.

    Raises:
        ValueError: if there are no histories, or a series is not as long as its epochs.
    """
    if not histories:
        raise ValueError("histories are empty: pass the history of at least one model")
    panels = [("Loss", {"train_loss": TRAIN_LINE, "val_loss": "-"})]
    panels += [("Macro F1", {"train_macro_f1": TRAIN_LINE, "val_macro_f1": "-"})]
    if any(history.get("learning_rate") is not None for history in histories.values()):
        panels += [("Learning rate (log scale)", {"learning_rate": "-"})]
    figure = new_figure(4.8 * len(panels), 5.0, title)
    for axes, (label, series) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (model, history), colour in zip(histories.items(), model_colours(len(histories)), strict=True):
            for key, line_style in series.items():
                _draw_series(axes, model, history, key, colour=colour, line_style=line_style)
        style(axes, "Epoch", grid="both")
        axes.set_ylabel(label, color=INK, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        if "learning_rate" in series:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:.0e}")  # typesetting powers of ten would take a quarter of a second
        if not axes.lines:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=MUTED)
            axes.set(xticks=[], yticks=[])
    _history_legend(figure, list(histories))
    return save(figure, path)


def plot_study(
    study: Any, *, folder: str | os.PathLike[str], name: str, objectives: Sequence[str] = ("macro_f1",)
) -> list[Path]:
    """Draws an Optuna study with Optuna's own plots, as `optuna_<name>_<what>.png`.

    Args:
        study: an `optuna.Study`.
        folder: where the PNGs go.
        name: of the model, for titles and file names.
        objectives: what the study's values are; with several, the Pareto front is drawn.

    Returns:
        The pictures that the study has enough trials for: history, slices, importances, Pareto front.
    """
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as optuna_plots

    done = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
    first = {"target": lambda trial: trial.values[0], "target_name": objectives[0]} if len(objectives) > 1 else {}
    pictures = {}
    if done:
        pictures["history"] = lambda: optuna_plots.plot_optimization_history(study, **first)
        pictures["slices"] = lambda: optuna_plots.plot_slice(study, **first)
    if len({trial.values[0] for trial in done}) >= 4:  # fewer tell nothing of what mattered
        pictures["importances"] = lambda: optuna_plots.plot_param_importances(study, **first)
    if len(objectives) == 2 and done:
        pictures["pareto_front"] = lambda: optuna_plots.plot_pareto_front(study, target_names=list(objectives))
    return [
        _save_optuna(draw, Path(folder) / f"optuna_{name}_{what}.png", title=f"{name}: {what.replace('_', ' ')}")
        for what, draw in pictures.items()
    ]


def _save_optuna(draw: Any, path: Path, *, title: str) -> Path:
    """Optuna draws with pyplot: its figure is fitted, saved and closed."""
    import warnings

    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its plots are marked experimental
        axes = np.ravel(draw())
    figure = axes[0].figure
    figure.set_size_inches(max(8.0, 3.2 * len(axes)), 4.8)
    for a in axes:
        a.set_title("")
        a.set_title("", loc="left")
        if a.get_ylabel() == "Objective Value":
            a.set_ylabel("validation macro F1")
        if a.get_xscale() == "log":  # its labels of 2, 3, 4, ... times a power of ten would cover each other
            low, high = a.get_xlim()
            a.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 100 else (1.0,), numticks=4))
            a.xaxis.set_major_formatter("{x:.0e}")
            a.xaxis.set_minor_formatter(NullFormatter())
        elif a.get_xlabel() == "Trial":
            a.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif a.get_xlabel() == "Hyperparameter Importance" and a.get_legend():
            a.get_legend().remove()  # it names one colour only, and covers the last label
    figure.suptitle(title)
    figure.set_layout_engine("constrained")
    try:
        return save(figure, path)
    finally:
        pyplot.close(figure)


def _draw_series(axes: Axes, model: str, history: Mapping[str, Any], key: str, *, colour: str, line_style: Any) -> None:
    """A line, if the series was recorded: short ones with a dot an epoch, validation macro F1 starred at its best."""
    if history.get(key) is None or len(history[key]) == 0:
        return
    epochs, values = np.asarray(history["epoch"]), np.asarray(history[key], dtype=np.float64)  # None becomes NaN
    if epochs.shape != values.shape:
        raise ValueError(f"{model}: {key} has {len(values)} values for {len(epochs)} epochs; put None where one lacks")
    marker = "o" if len(epochs) <= 12 else ""
    axes.plot(epochs, values, linestyle=line_style, linewidth=1.8, marker=marker, markersize=4, color=colour)
    if key == "val_macro_f1" and np.isfinite(values).any():
        best = int(np.nanargmax(values))
        axes.plot(epochs[best], values[best], "*", color=colour, markersize=13, markeredgecolor="white", zorder=4)


def _history_legend(figure: Figure, models: Sequence[str]) -> None:
    """Colours say which model, line styles which split: one legend below all panels instead of one in each."""
    colours = model_colours(len(models))
    handles = [
        Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in zip(models, colours, strict=True)
    ]
    handles += [
        Line2D([], [], color=MUTED, linestyle=TRAIN_LINE, label="train"),
        Line2D([], [], color=MUTED, linestyle="-", label="validation"),
        Line2D([], [], color=MUTED, linestyle="none", marker="*", markersize=11, label="best validation macro F1"),
    ]
    columns = 4 if max(map(len, models)) <= 30 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def model_colours(number: int) -> list[str]:
    """A colour for each of so many models, the same in every picture."""
    return [PALETTE[index % len(PALETTE)] for index in range(number)]


def shorten(name: str, length: int) -> str:
    """The name, cut with an ellipsis where it is longer."""
    return name if len(name) <= length else name[: length - 1] + "…"


def wrap_name(name: str, width: int) -> str:
    """The name in lines of at most so many characters, broken after underscores where there are any."""
    return "\n".join(textwrap.wrap(name.replace("_", "_ "), width)).replace("_ ", "_")


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches whose parts find their own places."""
    # A bare Figure draws with Agg and belongs to nobody: no pyplot, no window, nothing to close.
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.03)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK)
    return figure


def style(axes: Axes, x_label: str, *, grid: str) -> None:
    """What all axes have in common; `grid` is "x", "y" or "both"."""
    axes.set_xlabel(x_label, color=INK, fontsize=11)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(WAFER_COLOUR)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes the figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
    return write_atomically(path, buffer.getvalue())

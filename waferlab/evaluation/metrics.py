"""Scores of predictions with intervals, and the comparison of two models.

Two rules hold throughout. Metrics follow scikit-learn's definitions over the classes of which the scored maps hold at
least one: nothing can be said of how well a class without maps is found, so it is named, has no score, and is in no
average. Intervals come from leaving out *lots*: wafers of one lot share their process history and therefore their
errors, and taking single maps for independent would make intervals too narrow.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from waferlab.evaluation.predictions import Predictions

N_CALIBRATION_BINS = 15
BOUNDED_METRICS = ("accuracy", "macro_f1", "balanced_accuracy")  # shares and means of shares: 1 is the best
GRID_SIDES = (30, 55)  # dies of the longest side up to which a grid is small, and up to which it is no large one
INTERVAL_METRICS = (*BOUNDED_METRICS, "expected_calibration_error")


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


def scores_by_grid(predictions: Predictions, shapes: np.ndarray) -> list[dict[str, Any]]:
    """How well maps on small, middle and large grids are told: a network sees fewer pixels of a pattern on the small.

    Args:
        predictions: on maps.
        shapes: int [N, 2], rows and columns of each.

    Returns:
        A dict for each size of which there are maps: longest_side, in words; n_samples, n_groups; macro_f1 over the
        classes there, and its interval as in `compute_metrics`; recall {class: share, None without a map}.
    """
    longest, found = np.asarray(shapes).max(axis=1), []
    for above, most in pairwise((0, *GRID_SIDES, math.inf)):
        chosen = (longest > above) & (longest <= most)
        if not chosen.any():
            continue
        scores = compute_metrics(
            replace(
                predictions, probabilities=predictions.probabilities[chosen], labels=predictions.labels[chosen],
                groups=predictions.groups[chosen],
            )
        )  # fmt: skip
        words = f"over {above}" if most == math.inf else f"{above + 1} to {most}" if above else f"up to {most}"
        found.append({
            "longest_side": f"{words} dies",
            **{name: scores[name] for name in ("n_samples", "n_groups", "macro_f1")},
            "interval": scores["intervals"]["macro_f1"],
            "recall": {name: row["recall"] for name, row in scores["per_class"].items()},
        })  # fmt: skip
    return found


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
    recall = divide(hits, support)
    f1 = divide(2 * hits, support + called)
    return {
        "precision": divide(hits, called),
        "recall": recall,
        "f1": f1,
        "support": support,
        "accuracy": hits.sum(axis=-1) / total,
        "macro_f1": f1.sum(axis=-1) / n_present,
        "balanced_accuracy": recall.sum(axis=-1) / n_present,
        "expected_calibration_error": np.abs(gaps).sum(axis=-1) / total,
    }


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element by element; 0 where the denominator is 0."""
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


def jackknife_interval(scores: np.ndarray, without: np.ndarray, *, n_lots: np.ndarray | None = None) -> np.ndarray:
    """95% intervals [..., 2] of scores [...] in 0..1, from the scores without each of two lots or more [G, ...].

    Each score is known from `n_lots` [...] of them, without meaning below two; None: from all.
    """
    return _score_interval(np.asarray(scores), without, n_lots=len(without) if n_lots is None else n_lots)


def share_interval(shares: np.ndarray) -> list[float]:
    """95% interval of a mean of shares in 0..1, one a lot, float64 [G] of two lots or more; see `compute_metrics`."""
    mean, n_lots = shares.mean(), len(shares)
    return _score_interval(mean, (shares.sum() - shares) / (n_lots - 1), n_lots=n_lots).tolist()


def ratio_intervals(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """95% intervals of shares, each a ratio of two sums over lots; see `compute_metrics`.

    Args:
        parts: [G, P], what is counted, of each lot.
        wholes: [G, P], out of how many; their sum over lots is above 0.

    Returns:
        float64 [P, 2] in 0..1; NaN where fewer than two lots have a whole above 0.
    """
    part, whole, n_lots = parts.sum(axis=0), wholes.sum(axis=0), (wholes > 0).sum(axis=0)
    intervals = _score_interval(part / whole, divide(part - parts, whole - wholes), n_lots=n_lots)
    return np.where((n_lots > 1)[:, None], intervals, np.nan)


def mean_over_lots(values: np.ndarray, groups: np.ndarray) -> tuple[float, list[float] | None]:
    """The mean of a number of each map, float64 [N], and its 95% interval: the jackknife over lots.

    Args:
        values: one a map, far from bounds.
        groups: int64 [N], the lots.

    Returns:
        The mean, and [low, high]; None if all maps are of one lot.
    """
    lots, lot = np.unique(groups, return_inverse=True)
    mean, n_lots = float(values.mean()), len(lots)
    if n_lots < 2:
        return mean, None
    sums, counts = np.bincount(lot, weights=values), np.bincount(lot)
    without = (values.sum() - sums) / (len(values) - counts)
    half = float(_t_quantile(n_lots) * _jackknife_error(mean, without))
    return mean, [mean - half, mean + half]


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

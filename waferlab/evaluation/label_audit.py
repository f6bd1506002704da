"""How far labels are right, by confident learning; no label is changed.

From answers of networks on maps that they have not seen, this counts how many maps of a given class surely look like
another one: Northcutt, Jiang & Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", J. of
Artificial Intelligence Research 70 (arXiv 1911.00068), as cleanlab does it. A map counts for a class from the mean
probability on that the maps given this class have of it, so that calibration and class sizes matter little. One thing
is different: only maps that are answered as they are given make this mean. As published, wrong labels lower it for
their class, whose right maps then count more easily than its wrong ones: of 10% flipped labels it found 8%. A network's
mistakes lower it, too, and maps of other classes then count for it more easily. The rates as published stand beside.

What networks surely take for another class by a mistake of their own counts as a wrong label, too: look at the maps.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from waferlab.errors import ConfigError
from waferlab.evaluation.metrics import divide, jackknife_interval
from waferlab.evaluation.predictions import Predictions

MOST_BLOCKS = 200  # of lots to leave out in turn: where there are more lots, several at a time


def audit_labels(answers: Predictions) -> dict[str, Any]:
    """The estimated share of wrong labels, and what a classifier that is always right would score against them.

    Args:
        answers: of networks that were trained without these maps and their lots; `labels` as they were given. Each
            class has a map.

    Returns:
        As it goes into JSON: n_samples, n_groups; error_rate, of all maps, and its interval; perfect {accuracy,
        macro_f1, macro_f1_interval} of answers that are the true classes, scored against the given labels; per_class
        {name: maps, lots, error_rate, interval, as_published (the rate that way), really [[other class, share], ...],
        perfect_f1}; joint [C, C], shares of all maps by given (rows) and true class; interval_method. Intervals are
        95%, or None below two lots. They say how the estimate varies from lot to lot with the networks as they are, not
        what another network would say.

    Raises:
        ConfigError: cleanlab is not installed.
    """
    joint = estimated_joint(answers.labels, answers.probabilities)
    found, (intervals, method) = _shares(joint), _intervals(answers, _shares(joint))
    return {
        "n_samples": len(answers.labels),
        "n_groups": len(np.unique(answers.groups)),
        "error_rate": float(found["error_rate"]),
        "interval": intervals["error_rate"],
        "perfect": {
            "accuracy": float(1 - found["error_rate"]),
            "macro_f1": float(found["macro_f1"]),
            "macro_f1_interval": intervals["macro_f1"],
        },
        "per_class": _per_class(answers, joint, intervals["error_rates"]),
        "joint": joint.round(6).tolist(),
        "interval_method": method,
    }


def _intervals(answers: Predictions, found: dict[str, np.ndarray]) -> tuple[dict[str, Any], str]:
    """Of each of the shares, a list or None, and how they were made."""
    blocks, n_lots = _blocks(answers.groups), len(np.unique(answers.groups))
    n_blocks = int(blocks.max()) + 1
    if n_blocks < 2:
        return dict.fromkeys(found), "none: all maps come from a single lot"
    others = [blocks != block for block in range(n_blocks)]
    joints = [estimated_joint(answers.labels[kept], answers.probabilities[kept]) for kept in others]
    without, holders = _shares(np.array(joints)), {"error_rates": _blocks_with_each_class(answers, blocks)}
    intervals = {
        name: jackknife_interval(value, without[name], n_lots=holders.get(name)).tolist()
        for name, value in found.items()
    }
    of_lots = f"{n_lots:,} lots" if n_blocks == n_lots else f"{n_blocks} blocks of {n_lots:,} lots"
    return intervals, f"95% jackknife over {of_lots}, each left out in turn: t interval on the arcsine scale"


def _per_class(answers: Predictions, joint: np.ndarray, intervals: list[list[float]] | None) -> dict[str, Any]:
    rates, perfect, classes = _shares(joint)["error_rates"], _f1(joint), {}
    published = _shares(estimated_joint(answers.labels, answers.probabilities, as_published=True))["error_rates"]
    for label, name in enumerate(answers.class_names):
        lots = len(np.unique(answers.groups[answers.labels == label]))
        classes[name] = {
            "maps": int((answers.labels == label).sum()),
            "lots": lots,
            "error_rate": float(rates[label]),
            "interval": intervals[label] if intervals and lots > 1 else None,
            "as_published": float(published[label]),
            "really": _others(joint[label], label, answers.class_names),
            "perfect_f1": float(perfect[label]),
        }
    return classes


def estimated_joint(labels: np.ndarray, probabilities: np.ndarray, *, as_published: bool = False) -> np.ndarray:
    """Shares of all maps by given (rows) and true class, float64 [C, C]; sums to 1, the rows to those of the labels.

    Args:
        labels: int64 [N], as given.
        probabilities: float64 [N, C], of networks that were trained without these maps.
        as_published: with the mean over all maps of a class, see above.
    """
    counts = _confident_counts(labels, probabilities, as_published=as_published)
    # Calibrated here, as cleanlab rounds to whole maps, which hides how a small class varies.
    given = np.bincount(labels, minlength=probabilities.shape[1]) / len(labels)
    return counts / counts.sum(axis=1, keepdims=True) * given[:, None]


def _confident_counts(labels: np.ndarray, probabilities: np.ndarray, *, as_published: bool) -> np.ndarray:
    """Maps that surely are of a class, int64 [C, C], by given (rows) and that class; at least 1 on the diagonal."""
    count, n_classes = _cleanlab().count, probabilities.shape[1]
    floors = count.get_confident_thresholds(labels, probabilities)
    if not as_published:
        agree = np.flatnonzero(probabilities.argmax(axis=1) == labels)
        n_agree = np.bincount(labels[agree], minlength=n_classes)
        sums = np.bincount(labels[agree], weights=probabilities[agree, labels[agree]], minlength=n_classes)
        floors = np.where(n_agree > 0, divide(sums, n_agree), floors)
    return count.compute_confident_joint(labels, probabilities, thresholds=floors, calibrate=False)


def likeliest_wrong(answers: Predictions) -> np.ndarray:
    """Indices, int64 [M], of the maps whose labels are probably wrong, the likeliest first.

    As many of each pair of given and other class as the estimate has ("prune by noise rate"), by the margin between the
    probability of the given class and that of the likeliest other one.

    Raises:
        ConfigError: cleanlab is not installed.
    """
    joint = estimated_joint(answers.labels, answers.probabilities)
    counts = np.rint(joint * len(answers.labels)).astype(np.int64)
    found = _cleanlab().filter.find_label_issues(
        answers.labels, answers.probabilities, confident_joint=counts, return_indices_ranked_by="normalized_margin",
        n_jobs=1,
    )  # fmt: skip
    return np.asarray(found, dtype=np.int64)


def _shares(joint: np.ndarray) -> dict[str, np.ndarray]:
    """Error rates and the score of true classes against given ones, of joints [..., C, C]."""
    given = joint.sum(axis=-1)
    wrong = (joint * (1 - np.eye(joint.shape[-1]))).sum(axis=-1)  # not 1 - right: where none is wrong, this is 0
    return {
        "error_rate": wrong.sum(axis=-1),
        "error_rates": np.where(given > 0, divide(wrong, given), 0.0),
        "macro_f1": _f1(joint).sum(axis=-1) / (given > 0).sum(axis=-1),
    }


def _f1(joint: np.ndarray) -> np.ndarray:
    """F1 of each class [..., C] if the true classes are the answers and the given ones are what is right."""
    return divide(2 * np.diagonal(joint, axis1=-2, axis2=-1), joint.sum(axis=-1) + joint.sum(axis=-2))


def _others(row: np.ndarray, label: int, names: tuple[str, ...]) -> list[list[Any]]:
    """The classes that maps of a given class really have, each with its share of them, the largest first."""
    shares = row / row.sum()
    order = [other for other in np.argsort(-shares, kind="stable") if other != label and shares[other] > 0]
    return [[names[other], float(shares[other])] for other in order]


def _blocks(groups: np.ndarray) -> np.ndarray:
    """int64 [N]: which block of lots each map is in, from 0; each lot is one where there are few enough."""
    lots, lot = np.unique(groups, return_inverse=True)
    return lot % min(len(lots), MOST_BLOCKS)


def _blocks_with_each_class(answers: Predictions, blocks: np.ndarray) -> np.ndarray:
    """int64 [C]."""
    pairs = np.unique(np.column_stack([blocks, answers.labels]), axis=0)
    return np.bincount(pairs[:, 1], minlength=len(answers.class_names))


def check_that_cleanlab_is_there() -> None:
    """Before anything long is begun.

    Raises:
        ConfigError: it is not installed.
    """
    _cleanlab()


def _cleanlab() -> ModuleType:
    try:
        import cleanlab.count
        import cleanlab.filter
    except ImportError as error:
        raise ConfigError(
            "Labels are audited by cleanlab, which is not installed here. Install this project's extra `audit`: "
            "pip install '.[audit]'."
        ) from error
    return cleanlab

"""What a model said, and the truth."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


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

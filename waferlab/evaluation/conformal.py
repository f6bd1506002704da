"""Sets of classes that hold the true one as often as promised: for each class, on lots that nobody has seen.

A class is in the set of a map if its probability reaches the class's floor. Floors come from the validation part: split
conformal prediction with one threshold a class, "Mondrian" (Vovk, Gammerman & Shafer 2005, "Algorithmic Learning in a
Random World"; Sadinle, Lei & Wasserman 2019, arXiv 1609.00451). Maps of a lot are alike, so lots and not maps are what
is exchangeable: each lot of a class has the same weight, shared out among its maps, and so has the lot that is still to
come (Dunn, Wasserman & Ramdas 2023, arXiv 1809.07441; Lee, Barber & Willett 2023, arXiv 2306.06342). Then K lots can
promise a coverage of K / (K + 1) at the most, and where more is asked of a class, there is no promise for it.

What is promised is a mean, over validation parts and over new lots: a single fit may hold less or more. And it is of
lots from where the others came: `evaluate_sets` tells what became of it. Validation has also chosen the epoch and, if
asked to, the decision rule, which makes its own answers look a little better than those on new lots.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from waferlab.evaluation.predictions import Predictions

DEFAULT_COVERAGE = 0.9
COVERAGES = tuple(percent / 100 for percent in range(50, 100))  # those that floors are kept for
# A file answers a little otherwise than the checkpoint that the floors were fitted with, in proportion to a small
# probability. A fixed margin would lie above the floor of a class with one very unlikely map, and put it in every set.
MARGIN = 1e-3  # of a floor
MORE_THAN_ALL_OTHERS = 0.5  # the floor of a class of which validation had no map


@dataclass(frozen=True)
class PredictionSets:
    """The floors of each class, and how many lots they stand on.

    Attributes:
        class_names: C names.
        lots: of each class in the maps that the floors were fitted on, C numbers.
        floors: the least probability with which a class is in a set, [50, C]: a row for each of `COVERAGES`. Where a
            class has too few lots for a promise, the least probability of all its maps.
    """

    class_names: tuple[str, ...]
    lots: tuple[int, ...]
    floors: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, validation: Predictions) -> PredictionSets:
        """From the answers on maps that the network was not trained on."""
        columns, lots = [], []
        for label in range(len(validation.class_names)):
            members = validation.labels == label
            columns.append(_floors(validation.probabilities[members, label], validation.groups[members]))
            lots.append(len(np.unique(validation.groups[members])))
        rows = tuple(tuple(float(column[i]) for column in columns) for i in range(len(COVERAGES)))
        return cls(validation.class_names, tuple(lots), rows)

    def floors_at(self, coverage: float) -> np.ndarray:
        """float64 [C], those of a promised coverage.

        Raises:
            ValueError: it is none of `COVERAGES`.
        """
        return np.array(self.floors[_place_of(coverage)])

    def sets(self, probabilities: np.ndarray, coverage: float = DEFAULT_COVERAGE) -> np.ndarray:
        """Bool [N, C], which classes are in the set of each map, from its probabilities, float [N, C]."""
        return probabilities >= self.least_probabilities(coverage)

    def least_probabilities(self, coverage: float = DEFAULT_COVERAGE) -> np.ndarray:
        """float64 [C], from which on a class is in a set: the floors, less what rounding may take.

        Raises:
            ValueError: it is none of `COVERAGES`.
        """
        return (1 - MARGIN) * self.floors_at(coverage)

    def promised(self, coverage: float = DEFAULT_COVERAGE) -> np.ndarray:
        """Bool [C], for which classes the lots suffice for this coverage."""
        return np.array([_can_promise(lots, coverage) for lots in self.lots])

    def as_text(self) -> str:
        """JSON, for the exported file."""
        floors = [[float(f"{floor:.8g}") for floor in row] for row in self.floors]
        return json.dumps({"class_names": self.class_names, "lots": self.lots, "floors": floors})

    @classmethod
    def from_text(cls, text: str) -> PredictionSets:
        """What `as_text` gave.

        Raises:
            ValueError: the text is something else.
        """
        try:
            kept = json.loads(text)
            names, lots = tuple(map(str, kept["class_names"])), tuple(map(int, kept["lots"]))
            floors = np.array(kept["floors"], dtype=np.float64)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"these are no prediction sets ({error})") from error
        if floors.shape != (len(COVERAGES), len(names)) or len(lots) != len(names) or not np.isfinite(floors).all():
            raise ValueError(f"these are no prediction sets: floors {floors.shape} for {len(names)} classes")
        return cls(names, lots, tuple(map(tuple, floors.tolist())))


def answered_alone(held: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Bool [N]: the set (a row of bool [N, C]) is the likeliest class (int64 [N]) and nothing else."""
    return (held.sum(axis=1) == 1) & held[np.arange(len(held)), predicted]


def _place_of(coverage: float) -> int:
    nearest = int(np.argmin(np.abs(np.array(COVERAGES) - coverage)))
    if not abs(COVERAGES[nearest] - coverage) < 1e-9:  # written so that NaN is refused, too
        raise ValueError(
            f"coverage={coverage} has no floors. Allowed: {COVERAGES[0]} to {COVERAGES[-1]} in steps of 0.01."
        )
    return nearest


def _can_promise(lots: int, coverage: float) -> bool:
    """Whether the weight of so many lots, of one more that is to come, reaches the coverage."""
    return lots + 1e-9 >= coverage * (lots + 1)


def _floors(probabilities: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """float64 [50], the floor at each of `COVERAGES`, from the probabilities that maps of one class give it."""
    if not len(groups):
        return np.full(len(COVERAGES), MORE_THAN_ALL_OTHERS)
    _, lot, maps_of_lot = np.unique(groups, return_inverse=True, return_counts=True)
    n_lots = len(maps_of_lot)
    order = np.argsort(-probabilities, kind="stable")
    weight = np.cumsum(1 / ((n_lots + 1) * maps_of_lot[lot[order]]))
    # The first place at which the weight so far reaches the coverage; past the end where it never does.
    place = np.searchsorted(weight, np.array(COVERAGES) - 1e-9)
    return probabilities[order][np.minimum(place, len(order) - 1)]


def evaluate_sets(sets: PredictionSets, test: Predictions, coverage: float = DEFAULT_COVERAGE) -> dict[str, Any]:
    """What the promise comes to on maps of lots that neither training nor validation has seen.

    A class's coverage is the mean over its lots of the share of its maps that their sets hold, as the promise means it.

    Returns:
        coverage (promised); per_class {name: promised (bool), lots_fitted, lots, maps, covered (None without maps),
        interval (95%, jackknife over lots, t interval on the arcsine scale; None for fewer than two lots)};
        alone: share of maps whose set is their likeliest class and nothing else, so that it can be answered alone;
        several, none: shares by the size of the set; error_alone: share of wrong answers among those answered alone
        (None if there are none); error: among all maps, each answered by its likeliest class.
    """
    from waferlab.evaluation.metrics import share_interval

    held = sets.sets(test.probabilities, coverage)
    right = held[np.arange(len(test.labels)), test.labels]
    promised = sets.promised(coverage)
    per_class = {}
    for label, name in enumerate(test.class_names):
        members = test.labels == label
        shares = _share_in_each_lot(right[members], test.groups[members])
        per_class[name] = {
            "promised": bool(promised[label]),
            "lots_fitted": sets.lots[label],
            "lots": len(shares),
            "maps": int(members.sum()),
            "covered": float(shares.mean()) if len(shares) else None,
            "interval": share_interval(shares) if len(shares) > 1 else None,
        }
    size, wrong = held.sum(axis=1), test.predicted != test.labels
    alone = answered_alone(held, test.predicted)
    return {
        "coverage": coverage,
        "per_class": per_class,
        "alone": float(alone.mean()),
        "several": float((size > 1).mean()),
        "none": float((size == 0).mean()),
        "error_alone": float(wrong[alone].mean()) if alone.any() else None,
        "error": float(wrong.mean()),
    }


def _share_in_each_lot(right: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """float64 [lots], the share of maps of each lot for which `right` (bool [N]) holds."""
    _, lot = np.unique(groups, return_inverse=True)
    return np.bincount(lot, weights=right) / np.bincount(lot)


def least_lots(coverage: float) -> int:
    """The fewest lots of a class that can promise a coverage."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)

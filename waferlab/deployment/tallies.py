"""What is kept of maps that stream by: counts by class and by lot, the least certain maps, and what a report needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from waferlab.data.streaming import MapChunk
from waferlab.deployment.predictor import Answers
from waferlab.evaluation.predictions import Predictions

NO_DEFECT = "none"  # the class of maps without a pattern
LEAST_CERTAIN = 12
EXPLAINED_OF_A_CLASS, EXPLAINED = 2, 27
LOTS_LISTED = 20


@dataclass(frozen=True, eq=False)
class Example:
    """A map that is kept, with its answer: likeliest class, its probability, the set's classes or ()."""

    id: str
    lot: str
    wafer_map: np.ndarray
    called: str
    probability: float
    among: tuple[str, ...]

    @property
    def title(self) -> str:
        """Id and, if known, lot."""
        return f"{self.id}, lot {self.lot}" if self.lot else self.id

    @property
    def set_text(self) -> str:
        """The set's classes, for people."""
        return "|".join(self.among) or "empty set"

    def as_json(self) -> dict[str, Any]:
        """All but the dies."""
        among = "|".join(self.among)
        return {"id": self.id, "lot": self.lot, "class": self.called, "probability": self.probability, "set": among}


class Tallies:
    """Counts that take the same memory however many maps there are: so many bytes a lot, and a few maps.

    Attributes:
        maps: that were added.
        left_out: that the reader left out.

    Args:
        class_names: that the model answers with.
        labelled: keep answers and labels, for `predictions`; 50 bytes a map.
    """

    def __init__(self, class_names: Sequence[str], *, labelled: bool = False) -> None:
        self.class_names, self.maps, self.left_out = tuple(class_names), 0, 0
        n = len(self.class_names)
        self._counts, self._confidence, self._abstained = np.zeros(n, np.int64), np.zeros(n), np.zeros(n, np.int64)
        self._has_sets = False
        self._lots: dict[str, int] = {}
        self._by_lot = np.zeros((64, n + 1), np.int64)  # maps of each class, and those abstained from
        self._doubtful: list[Example] = []
        self._clear: dict[int, list[Example]] = {}
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = [] if labelled else None

    def add(self, chunk: MapChunk, answers: Answers) -> None:
        """Counts the maps of a chunk."""
        predicted, abstains, n = answers.predicted, answers.abstains, len(self.class_names)
        confidence = answers.probabilities.max(axis=1, initial=0)
        self._has_sets = answers.sets is not None
        self._counts += np.bincount(predicted, minlength=n)
        self._confidence += np.bincount(predicted, weights=confidence, minlength=n)
        self._abstained += np.bincount(predicted[abstains], minlength=n)
        lots = self._numbers_of(chunk.lots)
        known = lots >= 0
        np.add.at(self._by_lot, (lots[known], predicted[known]), 1)
        np.add.at(self._by_lot, (lots[known & abstains], n), 1)
        self._keep_examples(chunk, answers, confidence)
        if self._kept is not None:
            self._keep_labels(chunk, answers, lots)
        self.maps += len(answers)
        self.left_out += chunk.left_out

    def _numbers_of(self, lots: Sequence[str]) -> np.ndarray:
        """int64 [N], the row of each map's lot in `_by_lot`; -1 where it is not known."""
        numbers = np.array([self._lots.setdefault(lot, len(self._lots)) if lot else -1 for lot in lots], np.int64)
        while len(self._by_lot) < len(self._lots):
            self._by_lot = np.concatenate([self._by_lot, np.zeros_like(self._by_lot)])
        return numbers

    def _keep_examples(self, chunk: MapChunk, answers: Answers, confidence: np.ndarray) -> None:
        order, predicted = np.argsort(confidence, kind="stable"), answers.predicted

        def examples(indices: np.ndarray) -> list[Example]:
            return [
                Example(chunk.ids[i], chunk.lots[i], chunk.maps[i].copy(), called, float(confidence[i]), among)
                for i, called, among in zip(indices, *_names(answers, indices), strict=True)
            ]

        some = self._doubtful + examples(order[:LEAST_CERTAIN])
        self._doubtful = sorted(some, key=lambda one: one.probability)[:LEAST_CERTAIN]
        for label in np.unique(predicted).tolist():
            of_class = order[predicted[order] == label][::-1][:EXPLAINED_OF_A_CLASS]
            some = self._clear.get(label, []) + examples(of_class)
            self._clear[label] = sorted(some, key=lambda one: -one.probability)[:EXPLAINED_OF_A_CLASS]

    def _keep_labels(self, chunk: MapChunk, answers: Answers, lots: np.ndarray) -> None:
        places = {name: label for label, name in enumerate(self.class_names)}
        labelled = np.array([i for i, name in enumerate(chunk.labels) if name], dtype=np.int64)
        labels = np.array([places[chunk.labels[i]] for i in labelled], dtype=np.int64)
        alone = -1 - self.maps - np.arange(len(lots))  # a map of unknown lot is a lot of its own
        self._kept.append((answers.probabilities[labelled], labels, np.where(lots < 0, alone, lots)[labelled]))

    def predictions(self) -> Predictions | None:
        """The answers on all labelled maps; None if there is no such map."""
        probabilities, labels, groups = map(np.concatenate, zip(*self._kept, strict=True))
        if not len(labels):
            return None
        return Predictions(probabilities, labels, groups, self.class_names)

    @property
    def least_certain(self) -> list[Example]:
        """The maps whose likeliest class is the least likely, that map first."""
        return self._doubtful

    def examples(self) -> list[Example]:
        """Up to 27 maps: the surest of each class, and the least certain of all."""
        sure = [one for _, some in sorted(self._clear.items()) for one in some]
        doubtful = [one for one in self._doubtful if one.id not in {other.id for other in sure}]
        return [*doubtful[: max(0, EXPLAINED - len(sure))], *sure][:EXPLAINED]

    def by_class(self) -> dict[str, dict[str, Any]]:
        """{name: count, share, mean_confidence (None without maps), abstained (None without sets)}."""
        return {
            name: {
                "count": int(count),
                "share": count / max(1, self.maps),
                "mean_confidence": float(self._confidence[i] / count) if count else None,
                "abstained": int(self._abstained[i]) if self._has_sets else None,
            }
            for i, (name, count) in enumerate(zip(self.class_names, self._counts.tolist(), strict=True))
        }

    def by_lot(self) -> dict[str, Any]:
        """Lots with the largest share of defects first.

        Returns:
            lots (number of them), maps_of_unknown_lot; listed: of up to 20 lots lot, maps, defect_share, most_frequent
            (defect class, or None), abstained (None without sets); rest: of all others together lots, maps,
            defect_share (None without maps).
        """
        names, counts = list(self._lots), self._by_lot[: len(self._lots)]
        of_class, abstained = counts[:, :-1], counts[:, -1]
        defects = [label for label, name in enumerate(self.class_names) if name != NO_DEFECT]
        maps, defective = of_class.sum(1), of_class[:, defects].sum(1)
        order = np.argsort(-defective / np.maximum(maps, 1), kind="stable")
        listed = [
            {
                "lot": names[i],
                "maps": int(maps[i]),
                "defect_share": float(defective[i] / maps[i]),
                "most_frequent": self.class_names[defects[of_class[i, defects].argmax()]] if defective[i] else None,
                "abstained": int(abstained[i]) if self._has_sets else None,
            }
            for i in order[:LOTS_LISTED]
        ]
        rest, n_rest = order[LOTS_LISTED:], int(maps[order[LOTS_LISTED:]].sum())
        share = float(defective[rest].sum() / n_rest) if n_rest else None
        return {
            "lots": len(names),
            "maps_of_unknown_lot": self.maps - int(maps.sum()),
            "listed": listed,
            "rest": {"lots": len(rest), "maps": n_rest, "defect_share": share},
        }


def _names(answers: Answers, indices: np.ndarray) -> tuple[list[str], list[tuple[str, ...]]]:
    """The likeliest class and the set of some maps."""
    sets = None if answers.sets is None else answers.sets[indices]
    some = Answers(answers.class_names, answers.probabilities[indices], sets, answers.coverage)
    return some.classes, some.set_names()

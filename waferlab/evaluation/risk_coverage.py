"""How often the answers are wrong if only the surest are given: the risk-coverage curve.

Geifman & El-Yaniv 2017, "Selective Classification for Deep Neural Networks" (arXiv 1705.08500).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from waferlab.evaluation.metrics import ratio_intervals
from waferlab.evaluation.predictions import Predictions

POINTS = 200


@dataclass(frozen=True)
class RiskCoverage:
    """The curve, from the surest maps to all of them.

    Attributes:
        answered: float64 [P], share of the maps that are answered, increasing; the last is 1.
        error: float64 [P], share of wrong answers among those, each the likeliest class.
        interval: float64 [P, 2], 95% interval of the error; NaN where all these maps come from one lot.
    """

    answered: np.ndarray
    error: np.ndarray
    interval: np.ndarray


def risk_coverage(predictions: Predictions) -> RiskCoverage:
    """Answers the maps whose confidence reaches a threshold, for up to `POINTS` thresholds.

    Maps of equal confidence are answered together, as no threshold can part them. The interval is that
    of a ratio of sums over lots, wrong to answered maps, at each threshold; see `metrics.ratio_intervals`.
    """
    lots, lot = np.unique(predictions.groups, return_inverse=True)
    confidence = predictions.confidence
    by_confidence = np.sort(confidence)[::-1]
    places = np.linspace(0, len(confidence) - 1, POINTS).round().astype(np.int64)
    thresholds = np.unique(by_confidence[places])[::-1]
    # Of each map, the first threshold that it reaches, so that sums over thresholds are those of the answered maps.
    first = np.searchsorted(-thresholds, -confidence)
    cells, shape = lot * len(thresholds) + first, (len(lots), len(thresholds))
    wrong = (predictions.predicted != predictions.labels).astype(np.float64)
    answered_of_lot, wrong_of_lot = (
        np.bincount(cells, weights=weights, minlength=shape[0] * shape[1]).reshape(shape).cumsum(axis=1)
        for weights in (None, wrong)
    )
    answered = answered_of_lot.sum(axis=0)
    interval = ratio_intervals(wrong_of_lot, answered_of_lot)
    return RiskCoverage(answered / len(confidence), wrong_of_lot.sum(axis=0) / answered, interval)

"""Promises about the risk-coverage curve: it is the error of the surest maps, and its band is over lots."""

import numpy as np
import pytest
from made_up_predictions import from_hits, make_predictions

from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.risk_coverage import POINTS, risk_coverage


def test_each_point_is_the_error_of_the_surest_maps():
    predictions = make_predictions(n=90)
    curve = risk_coverage(predictions)
    surest = np.argsort(-predictions.confidence, kind="stable")
    wrong = (predictions.predicted != predictions.labels)[surest]
    np.testing.assert_allclose(curve.answered, np.arange(1, 91) / 90)
    np.testing.assert_allclose(curve.error, np.cumsum(wrong) / np.arange(1, 91))


def test_maps_of_equal_confidence_are_answered_together_in_whatever_order_they_come():
    hits = np.array([True, False, True, True, False, False])
    confidence = np.array([0.9, 0.9, 0.8, 0.7, 0.7, 0.7])
    for order in (np.arange(6), np.arange(6)[::-1]):
        curve = risk_coverage(from_hits(hits[order], confidence[order]))
        np.testing.assert_allclose(curve.answered, [2 / 6, 3 / 6, 1])
        np.testing.assert_allclose(curve.error, [1 / 2, 1 / 3, 1 / 2])


def test_of_very_many_maps_there_are_few_points_and_the_last_is_of_all_maps():
    predictions = make_predictions(n=5000)
    curve = risk_coverage(predictions)
    assert len(curve.error) <= POINTS and curve.answered[-1] == 1 and (np.diff(curve.answered) > 0).all()
    # With all maps answered it is the accuracy, whose interval is made in the same way.
    metrics = compute_metrics(predictions)
    assert curve.error[-1] == pytest.approx(1 - metrics["accuracy"])
    np.testing.assert_allclose(1 - curve.interval[-1][::-1], metrics["intervals"]["accuracy"])


def test_the_band_is_wider_where_maps_of_a_lot_err_together_and_lacks_where_there_is_one_lot():
    hits = np.arange(400) // 20 % 4 > 0
    confidence = np.linspace(0.6, 0.99, 400)
    together, scattered, one = (
        risk_coverage(from_hits(hits, confidence, groups))
        for groups in (np.arange(400) // 20, np.arange(400) % 20, np.zeros(400, int))
    )
    np.testing.assert_array_equal(together.error, scattered.error)
    assert np.ptp(together.interval[-1]) > 3 * np.ptp(scattered.interval[-1])
    assert np.isnan(one.interval).all() and np.isnan(together.interval[0]).all()

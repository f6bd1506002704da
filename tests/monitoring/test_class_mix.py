"""Promises about the class mix: a known one is found without labels, with an interval, and answers gain by it."""

import numpy as np
import pytest
from made_up_lots import make_sample

from waferlab.monitoring.class_mix import corrected_for_mix, estimate_mix, fit_calibration, mix_with_intervals

MIX = np.array([0.7, 0.25, 0.05])


@pytest.fixture(scope="module")
def calibration():
    sample, labels = make_sample(np.random.default_rng(0), 200, size=20, spread=0.0, mix=(0.1, 0.3, 0.6))
    return fit_calibration(sample.probabilities, labels)


def test_answers_are_right_as_often_as_they_say_once_calibrated(calibration):
    sample, labels = make_sample(np.random.default_rng(1), 200, size=20, spread=0.0, mix=(0.1, 0.3, 0.6))
    found = calibration.apply(sample.probabilities)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found.mean(axis=0), np.bincount(labels) / len(labels), atol=0.02)
    sure = found[:, 2] > 0.9
    assert (labels[sure] == 2).mean() == pytest.approx(found[sure, 2].mean(), abs=0.02)
    assert np.abs(sample.probabilities.mean(axis=0) - np.bincount(labels) / len(labels)).max() > 0.05


def test_a_known_mix_is_found_without_labels(calibration):
    sample, labels = make_sample(np.random.default_rng(2), 150, size=20, spread=0.0, mix=MIX)
    found, intervals = mix_with_intervals(calibration.likelihoods(sample.probabilities), sample.lots)
    counted = np.bincount(sample.probabilities.argmax(axis=1), minlength=3) / len(labels)
    np.testing.assert_allclose(found, MIX, atol=0.03)
    assert np.abs(found - MIX).sum() < np.abs(counted - MIX).sum() / 2
    assert found.sum() == pytest.approx(1)
    assert (intervals[:, 0] < MIX + 0.01).all() and (intervals[:, 1] > MIX - 0.01).all()
    assert (intervals[:, 1] - intervals[:, 0] < 0.1).all()


def test_lots_that_differ_widen_the_interval_and_a_single_lot_has_none(calibration):
    rng = np.random.default_rng(3)

    def width(**how):
        sample, _ = make_sample(rng, 12, size=40, spread=0.0, **how)
        return np.ptp(mix_with_intervals(calibration.likelihoods(sample.probabilities), sample.lots)[1], axis=1)[0]

    assert width() > 2 * width(mix=(1 / 3, 1 / 3, 1 / 3))
    alone, _ = make_sample(rng, 1, size=40)
    assert mix_with_intervals(calibration.likelihoods(alone.probabilities), alone.lots)[1] is None


def test_a_class_that_validation_lacks_is_neither_estimated_nor_in_the_way():
    sample, labels = make_sample(np.random.default_rng(4), 40, size=20, spread=0.0, mix=(0.5, 0.5, 0.0))
    calibration = fit_calibration(sample.probabilities, labels)
    found = estimate_mix(calibration.likelihoods(sample.probabilities), np.ones((len(labels), 1)))[0]
    np.testing.assert_allclose(found, [0.5, 0.5, 0], atol=0.04)
    assert found[2] == 0 and np.isfinite(calibration.bias).all()


def test_answers_corrected_for_the_mix_are_right_more_often(calibration):
    sample, labels = make_sample(np.random.default_rng(5), 150, size=20, spread=0.0, mix=MIX)
    answers = calibration.apply(sample.probabilities)
    corrected = corrected_for_mix(answers, calibration.prior, MIX)
    np.testing.assert_allclose(corrected.sum(axis=1), 1)
    assert (corrected.argmax(axis=1) == labels).mean() > (answers.argmax(axis=1) == labels).mean() + 0.02
    np.testing.assert_allclose(corrected_for_mix(answers, calibration.prior, calibration.prior), answers)


def test_a_map_that_stands_for_three_counts_as_three(calibration):
    sample, _ = make_sample(np.random.default_rng(3), 20)
    likelihoods = calibration.likelihoods(sample.probabilities)
    weights = np.random.default_rng(0).integers(1, 4, len(sample))
    places = np.repeat(np.arange(len(sample)), weights)
    found, intervals = mix_with_intervals(likelihoods, sample.lots, weights)
    as_many, theirs = mix_with_intervals(likelihoods[places], sample.lots[places])
    assert found == pytest.approx(as_many, abs=1e-5) and intervals == pytest.approx(theirs, abs=1e-4)

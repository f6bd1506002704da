"""Promises about prediction sets: what is promised is held on new lots, class by class, and where it cannot be."""

import numpy as np
import pytest

from waferlab.evaluation.conformal import PredictionSets, evaluate_sets, least_lots
from waferlab.evaluation.predictions import Predictions

NAMES = ("a", "b", "c")


def lots_of_maps(n_lots, maps_a_lot, *, seed, correlation=0.5):
    """Answers on three classes; what makes a lot hard is the same for all of its maps."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(3), n_lots * maps_a_lot)
    groups = np.repeat(np.arange(n_lots), 3 * maps_a_lot)
    hard = rng.normal(size=n_lots)[groups] * correlation**0.5 + rng.normal(size=len(labels)) * (1 - correlation) ** 0.5
    logits = rng.normal(size=(len(labels), 3)) + np.eye(3)[labels] * (2 + hard)[:, None]
    odds = np.exp(logits)
    return Predictions(odds / odds.sum(1, keepdims=True), labels, groups, NAMES)


@pytest.mark.parametrize(("lots", "coverage"), [(9, 0.9), (30, 0.9), (19, 0.95)])
def test_the_promise_is_held_on_average_over_new_lots_of_each_class(lots, coverage):
    held = []
    for seed in range(150):
        sets = PredictionSets.fit(lots_of_maps(lots, 6, seed=seed))
        assert sets.promised(coverage).all()
        found = evaluate_sets(sets, lots_of_maps(10, 6, seed=10_000 + seed), coverage)
        held.append([row["covered"] for row in found["per_class"].values()])
    mean, error = np.mean(held, axis=0), np.std(held, axis=0) / 150**0.5
    assert (mean > coverage - 3 * error).all() and (mean < coverage + 1 / (lots + 1) + 3 * error).all()


def test_with_too_few_lots_nothing_is_promised_and_the_set_is_as_wide_as_the_maps_allow():
    few = lots_of_maps(8, 6, seed=1)
    sets = PredictionSets.fit(few)
    assert least_lots(0.9) == 9 and least_lots(0.95) == 19
    assert not sets.promised(0.9).any() and sets.promised(0.88).all()
    assert sets.sets(few.probabilities, 0.9)[np.arange(len(few.labels)), few.labels].all()


def test_sets_survive_the_exported_file_and_rubbish_in_it_is_named():
    sets = PredictionSets.fit(lots_of_maps(12, 3, seed=2))
    again = PredictionSets.from_text(sets.as_text())
    some = lots_of_maps(5, 4, seed=3).probabilities
    assert again.lots == sets.lots and again.class_names == NAMES
    for coverage in (0.5, 0.9, 0.99):
        np.testing.assert_array_equal(again.sets(some, coverage), sets.sets(some, coverage))
    for text in ("", "{}", '{"class_names": ["a"], "lots": [1], "floors": [[0.5]]}'):
        with pytest.raises(ValueError, match="no prediction sets"):
            PredictionSets.from_text(text)


def test_a_coverage_that_has_no_floors_is_named():
    sets = PredictionSets.fit(lots_of_maps(12, 3, seed=2))
    for wrong in (0.3, 0.905, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"has no floors. Allowed: 0.5 to 0.99"):
            sets.sets(np.ones((1, 3)), wrong)

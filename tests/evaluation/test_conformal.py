"""Promises about prediction sets: what is promised is held on new lots, class by class, and where it cannot be."""

import numpy as np
import pytest

from waferlab.evaluation.conformal import COVERAGES, PredictionSets, evaluate_sets, least_lots
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


class Answered:
    """What crepes takes for a classifier: the probabilities are the answers already."""

    classes_ = np.arange(3)

    @staticmethod
    def predict_proba(probabilities):
        return probabilities


@pytest.mark.parametrize("n_lots", [20, 57, 200])
def test_with_one_map_a_lot_the_sets_are_those_of_class_conditional_conformal_prediction(n_lots):
    """As crepes computes its p values; a p value of 1 - coverage itself is outside, as in Vovk's definition."""
    from crepes import WrapClassifier

    rng = np.random.default_rng(n_lots)
    labels = rng.permutation(np.arange(n_lots) % 3)
    validation, test = (rng.dirichlet(np.full(3, 0.7), size=n) for n in (n_lots, 300))
    sets = PredictionSets.fit(Predictions(validation, labels, np.arange(n_lots), NAMES))
    other = WrapClassifier(Answered())
    other.calibrate(validation, labels, class_cond=True)
    p_values = other.predict_p(test, smoothing=False)
    compared = 0
    for coverage in COVERAGES:
        promised = sets.promised(coverage)
        wanted = p_values > 1 - coverage + 1e-9
        assert wanted[:, ~promised].all()  # whatever the map: so many lots cannot exclude a class
        np.testing.assert_array_equal((test >= sets.floors_at(coverage))[:, promised], wanted[:, promised])
        compared += promised.sum()
    assert compared > 40


def test_each_lot_of_a_class_weighs_the_same_however_many_maps_it_has():
    """Nine lots with a good map each and one of 91 bad maps: at 90% the bad ones just need not be held."""
    good = np.linspace(0.90, 0.98, 9)
    first = np.concatenate([good, np.full(91, 0.3)])
    answers = np.column_stack([first, 1 - first])
    groups = np.concatenate([np.arange(9), np.full(91, 9)])
    sets = PredictionSets.fit(Predictions(answers, np.zeros(100, int), groups, ("a", "b")))
    assert sets.floors_at(0.81)[0] == pytest.approx(0.90)  # 9 of 11 lots, the one to come included
    assert sets.floors_at(0.82)[0] == pytest.approx(0.3)
    assert sets.promised(0.90).tolist() == [True, False] and not sets.promised(0.91)[0]


def test_a_class_without_validation_maps_is_held_only_where_it_is_likelier_than_all_others_together():
    some = Predictions(np.array([[0.7, 0.3], [0.8, 0.2]]), np.zeros(2, int), np.arange(2), ("a", "b"))
    sets = PredictionSets.fit(some)
    assert sets.lots == (2, 0) and not sets.promised(0.9)[1]
    assert sets.sets(np.array([[0.52, 0.48], [0.48, 0.52]]))[:, 1].tolist() == [False, True]


@pytest.mark.parametrize("least", [0.3, 1e-4, 1e-9])
def test_a_map_on_the_floor_is_held_by_a_file_that_answers_a_little_otherwise_and_no_set_grows_by_much(least):
    answers = np.column_stack([np.linspace(least, 0.9, 12), 1 - np.linspace(least, 0.9, 12)])
    sets = PredictionSets.fit(Predictions(answers, np.zeros(12, int), np.arange(12), ("a", "b")))
    assert sets.floors_at(0.92)[0] == least
    nearly = least * np.array([1 - 5e-4, 1, 0.9, 0.01])
    assert sets.sets(np.column_stack([nearly, 1 - nearly]), 0.92)[:, 0].tolist() == [True, True, False, False]


def test_what_the_promise_came_to_is_counted_lot_by_lot_and_map_by_map():
    floors = tuple((0.6, 0.3, 0.2) for _ in COVERAGES)
    sets = PredictionSets(NAMES, (9, 8, 30), floors)
    answers = np.array(
        [
            [0.70, 0.20, 0.10],  # a alone, right
            [0.50, 0.25, 0.25],  # c alone, which is not the likeliest
            [0.55, 0.29, 0.16],  # none; a, missed
            [0.70, 0.15, 0.15],  # a alone, wrong: b
            [0.35, 0.45, 0.20],  # b and c, right: b
            [0.10, 0.35, 0.55],  # b and c, wrong: b
        ]
    )
    test = Predictions(answers, np.array([0, 0, 0, 1, 1, 1]), np.array([1, 1, 2, 5, 5, 6]), NAMES)
    found = evaluate_sets(sets, test)
    assert [found[what] for what in ("alone", "several", "none")] == pytest.approx([2 / 6, 2 / 6, 1 / 6])
    assert found["error_alone"] == 0.5 and found["error"] == pytest.approx(2 / 6)
    a, b, c = (found["per_class"][name] for name in NAMES)
    assert (a["covered"], a["lots"], a["maps"], a["lots_fitted"], a["promised"]) == (0.25, 2, 3, 9, True)
    assert (b["covered"], b["promised"]) == (0.75, False)  # half of a lot, all of another
    assert a["interval"][0] <= 0.25 <= a["interval"][1]
    assert (c["covered"], c["interval"], c["lots"], c["promised"]) == (None, None, 0, True)


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

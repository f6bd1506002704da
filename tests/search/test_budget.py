"""Promises about seconds: who gets how many of a time limit, and when a search is over."""

import pytest
from made_up import pipeline
from made_up_trials import Clock, a_search, a_study, add_trial, trained
from optuna.trial import TrialState

from integrated_pipeline import IntegratedMLPipeline
from waferlab.search.budget import SearchBudget, seconds_by_merit


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("waferlab.search.budget.time", clock)
    return clock


# --- a search


def test_a_search_has_the_rest_of_its_seconds_only_and_a_trial_twice_its_even_share(clock):
    budget, given = SearchBudget(a_study(), wanted=4, seconds=100), []
    for _ in range(4):
        given.append(budget.for_a_trial())
        clock.now += 30
    assert given == [50, 50, 40, 10]
    assert budget.left() == -20 and budget.used_up()
    assert budget.for_a_trial() == 1.0  # never less than a second


def test_seconds_of_earlier_sittings_are_gone_but_for_those_of_trials_that_run_again(clock):
    study = a_study(0.5, seconds=12)
    cut_off = add_trial(study, state=TrialState.FAIL, seconds=50)
    add_trial(study, state=TrialState.WAITING, again=cut_off.number)
    assert SearchBudget(study, wanted=9, seconds=30).left() == 30 - 12
    assert SearchBudget(study, wanted=9, seconds=5).left() == 0


@pytest.mark.parametrize(("more", "over"), [(0.4, True), (0.6, False)])
@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5, None)])
def test_a_search_is_over_when_less_than_half_a_typical_trial_is_left(values, more, over, clock):
    study = a_study(*values, seconds=10)
    assert SearchBudget(study, wanted=9, seconds=10 * (len(values) + more)).used_up() is over


def test_a_search_begins_however_short_its_time_and_not_without_any(clock):
    assert not SearchBudget(a_study(), wanted=9, seconds=0.5).used_up()
    assert SearchBudget(a_study(), wanted=9, seconds=0.0).used_up()


def test_without_a_limit_a_search_is_over_with_its_last_trial(clock):
    study = a_study(0.5, None, seconds=1000)
    budget = SearchBudget(study, wanted=3)
    assert budget.for_a_trial() is None and budget.left() == float("inf") and not budget.used_up()
    add_trial(study, state=TrialState.RUNNING)
    assert not budget.used_up()
    add_trial(study, state=TrialState.FAIL)
    assert budget.used_up()


# --- all models


@pytest.mark.parametrize(
    ("limit", "given"),
    [
        (100, {"a": 10, "b": 40, "c": 10}),  # of the 60 that the searches leave
        (20, {"a": 0.5, "b": 2, "c": 0.5}),  # nothing is left: a second for each
    ],
)
def test_what_did_best_in_its_search_gets_the_longest_final_training(limit, given):
    searches = {"a": a_search(0.4, seconds=10), "b": a_search(0.6, seconds=25), "c": a_search(0.5, seconds=5)}
    for name, seconds in given.items():
        assert seconds_by_merit(name, searches, limit=limit, favourite_share=2 / 3) == pytest.approx(seconds)


def searching(data, folder, **more):
    return pipeline(data, folder, **{"enable_optuna": True, "model_type": "lightning_cnn", **more})


@pytest.fixture
def handed(monkeypatch):
    """Seconds that searches and final trainings are handed, by model; none of them is made."""
    searched, trainings = {}, {}
    found = {
        "torchvision_resnet": a_search(0.4, seconds=30.0),
        "lightning_cnn": a_search(0.6, seconds=49.9),
        "yolo_inspired": a_search(0.5, seconds=5.0),
    }

    def search(self, name, *, seconds=None):
        searched[name] = seconds
        return found[name]

    def train(self, name, params=None, *, seconds=None):
        trainings[name] = seconds
        return trained(0.9, model_type=name)

    monkeypatch.setattr(IntegratedMLPipeline, "search", search)
    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", train)
    return searched, trainings


def test_a_search_gets_its_share_of_the_models_time_and_the_final_training_what_is_left(handed, tiny_npz, tmp_path):
    searched, trainings = handed
    names = ["torchvision_resnet", "lightning_cnn"]
    made = searching(tiny_npz, tmp_path, model_type=names, time_limit=100, search_share=0.4)
    for name in names:
        made.search_and_train(name)
    assert searched == {"torchvision_resnet": 20, "lightning_cnn": 20}
    assert trainings == {"torchvision_resnet": pytest.approx(20), "lightning_cnn": 1.0}  # never less than a second
    assert made.terminal.seconds.keys() == {"search", "training"}

    trainings.clear()
    alone = searching(tiny_npz, tmp_path, model_type=names, time_limit=100, enable_optuna=False)
    alone.search_and_train("torchvision_resnet")
    assert trainings == {"torchvision_resnet": 50}


class BeforeTheScores(Exception):
    pass


def test_a_run_hands_out_what_all_searches_left_by_merit(handed, tiny_npz, tmp_path, monkeypatch):
    def no_scores(self, records):
        raise BeforeTheScores

    monkeypatch.setattr(IntegratedMLPipeline, "evaluate", no_scores)
    names, (searched, trainings) = ["torchvision_resnet", "lightning_cnn", "yolo_inspired"], handed
    made = searching(tiny_npz, tmp_path, model_type=names, time_limit=180, search_share=0.6, favourite_share=0.5)
    with pytest.raises(BeforeTheScores):
        made.run_complete_pipeline()
    assert searched == pytest.approx(dict.fromkeys(names, 0.6 * 180 / 3))
    left = 180 - 30 - 49.9 - 5
    expected = {"torchvision_resnet": left / 4, "lightning_cnn": left / 2, "yolo_inspired": left / 4}
    assert trainings == pytest.approx(expected)


def test_without_a_time_limit_neither_search_nor_training_has_one(handed, tiny_npz, tmp_path):
    searching(tiny_npz, tmp_path).search_and_train("lightning_cnn")
    assert handed == ({"lightning_cnn": None}, {"lightning_cnn": None})

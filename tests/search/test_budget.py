"""Promises about seconds: whether a search pays, who gets how many of a time limit, and when a search is over."""

import multiprocessing
import time

import pytest
from made_up import pipeline
from made_up_trials import Clock, a_search, a_study, add_trial, trained
from optuna.trial import TrialState

from integrated_pipeline import IntegratedMLPipeline
from waferlab.errors import DamagedFileError, SearchFailedError
from waferlab.search.budget import (
    EPOCHS_FOR_A_SEARCH,
    SearchBudget,
    SearchPlan,
    plan_search,
    planned_once,
    seconds_by_merit,
)
from waferlab.search.study import run_again


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("waferlab.search.budget.time", clock)
    return clock


# --- whether a search pays, and how large it is


def planned(**more):
    asked = {"trials": 20, "epochs": 8, "workers": 1, "seconds": 1000.0, "share": 0.4, "seconds_an_epoch": 1.0}
    return plan_search(**asked | more)


def test_without_a_limit_a_search_is_as_large_as_is_wanted():
    assert planned(seconds=None, seconds_an_epoch=0.0) == SearchPlan(20, 8)


def test_with_time_enough_it_is_as_large_as_is_wanted_and_has_its_share_of_the_seconds():
    assert planned() == SearchPlan(20, 8, 400.0)


@pytest.mark.parametrize(("seconds", "any"), [(EPOCHS_FOR_A_SEARCH - 0.5, False), (EPOCHS_FOR_A_SEARCH, True)])
def test_where_few_epochs_fit_into_the_time_there_is_no_search_and_it_says_why(seconds, any):
    plan = planned(seconds=2 * seconds, seconds_an_epoch=2.0)
    assert bool(plan.trials) == any == (not plan.none_because)
    if not any:
        assert plan.none_because == "14 epochs fit into 29 s, and a search pays from 15 on"


def test_where_time_is_short_trials_have_fewer_epochs_but_never_less_than_three():
    epochs = [planned(seconds=seconds).epochs for seconds in (15, 50, 150, 170, 300)]
    assert epochs[:2] == [3, 3] and epochs == sorted(epochs) and 3 < epochs[2] < epochs[3] < epochs[4] == 8
    assert {planned(seconds=seconds).trials for seconds in (15, 150, 300)} == {20}
    assert [planned(seconds=seconds, epochs=2).epochs for seconds in (15, 1000)] == [2, 2]  # nor more than are wanted


@pytest.mark.parametrize("more", [{"workers": 2}, {"share": 0.8}, {"trials": 5}, {"seconds_an_epoch": 0.5}])
def test_workers_a_larger_share_and_fewer_trials_give_each_trial_more_epochs(more):
    assert planned(seconds=150, **more).epochs > planned(seconds=150).epochs


def test_the_epochs_of_a_plan_fit_into_its_seconds():
    """As few of the trials as are better than all before in random order, one in three at least, come to their end."""
    for trials in (3, 5, 20, 100):
        plan = planned(trials=trials, epochs=1000, seconds=2000.0)
        ended = max(trials / 3, 1)
        assert ended * plan.epochs <= plan.seconds
        assert (ended + 1) * 2.2 * plan.epochs > plan.seconds  # most of them is used


def test_a_plan_is_found_again_unless_something_else_is_asked_or_nobody_looks(tmp_path):
    file, before, now = tmp_path / "model/plan.json", planned(), planned(seconds=10, seconds_an_epoch=1.0)
    assert planned_once(file, lambda: before, asked={"seconds": 1000}, look=True) == before
    assert planned_once(file, lambda: now, asked={"seconds": 1000}, look=True) == before
    assert planned_once(file, lambda: now, asked={"seconds": 10}, look=True) == now
    assert planned_once(file, lambda: before, asked={"seconds": 10}, look=False) == before
    file.write_text("{")
    with pytest.raises(DamagedFileError, match=r"plan\.json is damaged"):
        planned_once(file, lambda: now, asked={"seconds": 10}, look=True)


# --- when a search is over


def a_budget(study, *, trials=9, seconds=None, workers=1):
    return SearchBudget(study, SearchPlan(trials, 8, seconds), workers=workers)


def test_a_search_has_the_rest_of_its_seconds_only_and_a_trial_twice_its_even_share(clock):
    budget, given = a_budget(a_study(), trials=4, seconds=100), []
    for _ in range(4):
        given.append(budget.for_a_trial())
        clock.now += 30
    assert given == [50, 50, 40, 10]
    assert budget.left() == -20 and not budget.starts_another(a_study())
    assert budget.for_a_trial() == 1.0  # never less than a second


def test_of_trials_side_by_side_each_has_as_many_times_more(clock):
    assert a_budget(a_study(), trials=8, seconds=100, workers=2).for_a_trial() == 50


def test_seconds_of_earlier_sittings_are_gone_but_for_those_of_trials_that_run_again(clock):
    study = a_study(0.5, seconds=12)
    cut_off = add_trial(study, state=TrialState.FAIL, seconds=50)
    add_trial(study, state=TrialState.WAITING, again=cut_off.number)
    assert a_budget(study, seconds=30).left() == 30 - 12
    assert a_budget(study, seconds=5).left() == 0


@pytest.mark.parametrize(("more", "over"), [(0.4, True), (0.6, False)])
@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5, None)])
def test_a_search_is_over_when_less_than_half_a_typical_trial_is_left(values, more, over, clock):
    study = a_study(*values, seconds=10)
    assert a_budget(study, seconds=10 * (len(values) + more)).starts_another(study) is not over


def test_a_clock_that_jumps_an_hour_ahead_does_not_end_a_search(clock):
    study = a_study()
    add_trial(study, 0.5, seconds=3610, noted=10)
    assert a_budget(study, seconds=30).starts_another(study)


def test_a_search_begins_however_short_its_time_and_not_without_any(clock):
    assert a_budget(a_study(), seconds=0.5).starts_another(a_study())
    assert not a_budget(a_study(), seconds=0.0).starts_another(a_study())


def test_without_a_limit_a_search_is_over_with_its_last_trial(clock):
    study = a_study(0.5, None, seconds=1000)
    budget = a_budget(study, trials=3)
    assert budget.for_a_trial() is None and budget.left() == float("inf")
    assert budget.starts_another(study)
    add_trial(study, state=TrialState.FAIL)
    assert not budget.starts_another(study)


def test_the_place_of_a_trial_that_was_taken_away_is_free_again(clock):
    study = a_study()
    budget = a_budget(study, trials=1)
    assert budget.starts_another(study) and not budget.starts_another(study)
    budget.give_back()
    assert budget.starts_another(study)


def test_trials_that_others_who_share_the_study_are_running_count(clock):
    study = a_study(0.5)
    budget = a_budget(study, trials=3)
    for _ in range(2):
        add_trial(study, state=TrialState.RUNNING)
    assert not budget.starts_another(study)


def test_a_trial_that_was_cut_off_is_started_again_beside_as_many_as_are_wanted(clock):
    study = a_study(0.5)
    cut_off = add_trial(study, state=TrialState.FAIL)
    add_trial(study, state=TrialState.WAITING, again=cut_off.number)
    budget = a_budget(study, trials=2)
    assert [budget.starts_another(study) for _ in range(2)] == [True, False]


def test_a_lost_trial_keeps_its_place_until_somebody_puts_it_back_in_the_queue(clock):
    study = a_study(0.5)
    lost = add_trial(study, state=TrialState.FAIL)
    budget = a_budget(study, trials=2)
    assert not budget.starts_another(study), "another one would take the place of the lost"
    late = study.ask()
    assert budget.is_one_too_many(study, late)
    late.set_user_attr("surplus", True)
    study.tell(late, state=TrialState.FAIL)
    run_again(study, lost)
    assert budget.starts_another(study)


def test_processes_that_share_a_budget_start_exactly_as_many_trials_as_are_wanted():
    study, context = a_study(), multiprocessing.get_context("fork")
    budget, started = a_budget(study, trials=200), context.Value("i", 0)

    def ask():
        while budget.starts_another(study):
            with started.get_lock():
                started.value += 1

    crew = [context.Process(target=ask) for _ in range(4)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    assert started.value == 200 and [process.exitcode for process in crew] == [0] * 4


# --- all models


@pytest.mark.parametrize(
    ("limit", "given"),
    [
        (100, {"a": 10, "b": 40, "c": 10}),  # of the 60 that the searches leave
        (20, {"a": 0.5, "b": 2, "c": 0.5}),  # nothing is left: a second for each
        (100, {"a": 20 / 3, "b": 40, "c": 20 / 3, "without a search": 20 / 3}),
    ],
)
def test_what_did_best_in_its_search_gets_the_longest_final_training(limit, given):
    searches = {"a": a_search(0.4, seconds=10), "b": a_search(0.6, seconds=25), "c": a_search(0.5, seconds=5)}
    for name, seconds in given.items():
        found = seconds_by_merit(name, searches, models=len(given), limit=limit, favourite_share=2 / 3)
        assert found == pytest.approx(seconds)


def searching(data, folder, **more):
    return pipeline(data, folder, **{"enable_optuna": True, "model_type": "lightning_cnn", **more})


@pytest.fixture
def handed(monkeypatch):
    """Seconds that searches and final trainings are handed, by model; none of them is made.

    A training step takes a hundredth of a second.
    """
    searched, trainings = {}, {}
    found = {
        "torchvision_resnet": a_search(0.4, seconds=30.0),
        "lightning_cnn": a_search(0.6, seconds=49.9),
        "yolo_inspired": a_search(0.5, seconds=5.0),
    }

    def search(self, name, plan):
        searched[name] = plan.seconds
        return found[name]

    def train(self, name, params=None, *, seconds=None, trial=None):
        trainings[name] = seconds
        return trained(0.9, model_type=name)

    monkeypatch.setattr(IntegratedMLPipeline, "search", search)
    monkeypatch.setattr(IntegratedMLPipeline, "train_final_model", train)
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", lambda *_, **__: 0.01)
    return searched, trainings


def test_a_search_gets_its_share_of_the_models_time_and_the_final_training_what_is_left(handed, tiny_npz, tmp_path):
    searched, trainings = handed
    names = ["torchvision_resnet", "lightning_cnn"]
    made = searching(tiny_npz, tmp_path, model_type=names, time_limit=100, search_share=0.4)
    for name in names:
        made.search_and_train(name)
    assert searched == {"torchvision_resnet": 20, "lightning_cnn": 20}
    assert trainings == {"torchvision_resnet": pytest.approx(20), "lightning_cnn": 1.0}  # never less than a second
    assert made.terminal.seconds.keys() == {"training"}

    trainings.clear()
    alone = searching(tiny_npz, tmp_path, model_type=names, time_limit=100, enable_optuna=False)
    alone.search_and_train("torchvision_resnet")
    assert trainings == {"torchvision_resnet": 50}


class BeforeTheScores(Exception):
    pass


def no_scores(self, records):
    raise BeforeTheScores


def test_a_run_hands_out_what_all_searches_left_by_merit(handed, tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(IntegratedMLPipeline, "evaluate", no_scores)
    names, (searched, trainings) = ["torchvision_resnet", "lightning_cnn", "yolo_inspired"], handed
    made = searching(tiny_npz, tmp_path, model_type=names, time_limit=180, search_share=0.6, favourite_share=0.5)
    with pytest.raises(BeforeTheScores):
        made.run_complete_pipeline()
    assert searched == pytest.approx(dict.fromkeys(names, 0.6 * 180 / 3))
    left = 180 - 30 - 49.9 - 5
    expected = {"torchvision_resnet": left / 4, "lightning_cnn": left / 2, "yolo_inspired": left / 4}
    assert trainings == pytest.approx(expected)


def test_seconds_of_a_search_that_found_nothing_are_not_handed_out_again(handed, tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(IntegratedMLPipeline, "evaluate", no_scores)
    names, (_, trainings), search = ["torchvision_resnet", "lightning_cnn"], handed, IntegratedMLPipeline.search

    def one_fails(self, name, plan):
        if name == "torchvision_resnet":
            self.studies[name] = a_study(0.5, 0.5, seconds=20.0)
            raise SearchFailedError("no trial came to its end")
        return search(self, name, plan)

    monkeypatch.setattr(IntegratedMLPipeline, "search", one_fails)
    with pytest.raises(BeforeTheScores):
        searching(tiny_npz, tmp_path, model_type=names, time_limit=180, favourite_share=0.5).run_complete_pipeline()
    assert trainings == pytest.approx({"lightning_cnn": 180 - 49.9 - 40})


def test_without_a_time_limit_neither_search_nor_training_has_one(handed, tiny_npz, tmp_path):
    searching(tiny_npz, tmp_path).search_and_train("lightning_cnn")
    assert handed == ({"lightning_cnn": None}, {"lightning_cnn": None})


# --- what a run plans


def test_a_trial_is_no_longer_than_what_the_final_training_has_before_its_learning_rate_falls(tiny_npz, tmp_path):
    plans = [
        searching(tiny_npz, tmp_path, search_epochs=8, max_epochs=epochs).plan_search("lightning_cnn", None)
        for epochs in (1, 2, 10, 16, 50)
    ]
    assert [plan.epochs for plan in plans] == [1, 1, 5, 8, 8]


def test_the_pace_is_measured_in_steps_of_training_and_of_validation(tiny_npz, tmp_path, monkeypatch):
    steps = iter([0.01, 0.02])
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", lambda *_, **__: next(steps))
    made = searching(tiny_npz, tmp_path, num_optuna_trials=3)
    made.prepare_data()
    batches = len(made.split.train) // 16 + 0.35 * len(made.split.validation) / 16  # an answer costs a third of a step
    assert made.plan_search("lightning_cnn", 15.1 * batches * 0.01).trials == 3
    assert not made.plan_search("lightning_cnn", 14.9 * batches * 0.01).trials  # it is measured once
    slower = searching(tiny_npz, tmp_path, num_optuna_trials=3)
    assert "8 epochs fit" in slower.plan_search("lightning_cnn", 15.1 * batches * 0.01).none_because


def test_a_resumed_run_plans_as_before_however_quick_the_machine_is_now(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", lambda *_, **__: 0.01)
    plan = searching(tiny_npz, tmp_path).plan_search("lightning_cnn", 60.0)
    assert plan.trials
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", lambda *_, **__: 10.0)
    assert searching(tiny_npz, tmp_path, resume=True).plan_search("lightning_cnn", 60.0) == plan
    assert searching(tiny_npz, tmp_path).plan_search("lightning_cnn", 60.0).none_because


def test_of_many_maps_a_trials_epoch_has_a_part(tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.MAPS_OF_A_TRIALS_EPOCH", 64)
    monkeypatch.setattr("integrated_pipeline.seconds_a_step", lambda *_, **__: 1.0)
    made = searching(tiny_npz, tmp_path)
    made.prepare_data()
    an_epoch = 4 + 0.35 * len(made.split.validation) / 16
    assert made.plan_search("lightning_cnn", 15.1 * an_epoch).trials == 3
    assert not made.plan_search("lightning_cnn", 14.9 * an_epoch).trials


def test_who_joins_a_search_has_as_much_time_left_as_who_leads_it():
    study = a_study(0.5, 0.6, seconds=20.0)
    leads = SearchBudget(study, SearchPlan(10, 3, 100.0))
    joins = SearchBudget(study, SearchPlan(10, 3, 100.0, until=time.time() + leads.left()))
    assert joins.left() == pytest.approx(leads.left(), abs=0.1) == pytest.approx(60, abs=0.5)
    assert joins.for_a_trial() == pytest.approx(leads.for_a_trial(), abs=0.1)
    assert SearchBudget(study, SearchPlan(10, 3, until=None)).left() == float("inf")

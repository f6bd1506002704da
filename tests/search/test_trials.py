"""Promises about trials: which count, which weights stay, what is gone on from, what is said of them."""

from dataclasses import replace

import optuna
import pytest
from made_up_trials import a_search, a_study, a_trial, add_trial, trained
from optuna.trial import TrialState

from waferlab.errors import SearchFailedError
from waferlab.search.trials import (
    TrialWeights,
    better_of,
    counted_trials,
    search_record,
    study_seconds,
    trial_line,
    worth_training,
)


@pytest.fixture
def said():
    return []


# --- which count


def test_a_trial_that_was_cut_off_runs_again_and_counts_once_with_its_seconds():
    study = a_study(0.5, seconds=8)
    cut_off = add_trial(study, state=TrialState.FAIL, seconds=100)
    add_trial(study, 0.6, seconds=12, again=cut_off.number)
    add_trial(study, seconds=4)  # pruned
    add_trial(study, state=TrialState.FAIL, seconds=2, reason="made up")
    add_trial(study, state=TrialState.RUNNING)
    assert [trial.number for trial in counted_trials(study)] == [0, 2, 3, 4]
    assert study_seconds(study) == 8 + 12 + 4 + 2


@pytest.mark.parametrize(("seconds_left", "left"), [(float("inf"), 20), (5.2, 5), (-3, 0)])
def test_the_line_of_a_trial_says_how_long_the_search_will_take(seconds_left, left):
    study = a_study(0.5, seconds=8)
    add_trial(study, 0.5, seconds=12)  # ten on average, and two of four are left
    line = trial_line(study, study.trials[-1], wanted=4, seconds_left=seconds_left)
    assert line.startswith("  trial 2/4  complete  0.500  best 0.500") and line.endswith(f"about {left} s left")


def test_the_line_of_a_failed_trial_says_why_and_what_is_best_so_far():
    study = a_study(0.25, 0.75)
    add_trial(study, state=TrialState.FAIL, params={"rate": 0.00125}, reason="made up")
    line = trial_line(study, study.trials[-1], wanted=9, seconds_left=float("inf"))
    assert line.startswith("  trial 3/9  fail        -    best 0.750  rate 0.00125") and line.endswith("(made up)")


# --- their weights


def kept(folder):
    return sorted(int(file.stem) for file in folder.iterdir())


def leave_weights(weights, *numbers):
    weights.folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        weights.file(number).write_bytes(b"weights of %d" % number)


def test_only_weights_that_can_still_win_are_kept(tmp_path):
    study, weights = a_study(0.2, 0.6, None, 0.4), TrialWeights(tmp_path)
    add_trial(study, state=TrialState.RUNNING)
    leave_weights(weights, *range(5))
    (tmp_path / "3-v1.ckpt").touch()  # of nobody
    weights.forget_beaten(study)
    assert kept(tmp_path) == [1, 4]


def test_all_weights_of_a_pareto_front_are_kept(tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"])
    for values in ((0.5, 10), (0.6, 20), (0.55, 30)):
        add_trial(study, values=values, macro_f1=values[0])
    weights = TrialWeights(tmp_path)
    leave_weights(weights, 0, 1, 2)
    weights.forget_beaten(study)
    assert kept(tmp_path) == [0, 1]


def test_weights_reach_who_shares_the_folder_and_those_of_beaten_trials_go(tmp_path):
    here, there = (TrialWeights(tmp_path / name, shared=tmp_path / "shared") for name in ("here", "there"))
    study = optuna.create_study(direction="maximize")
    for value in (0.5, 0.6):
        trial = study.ask()
        leave_weights(here, trial.number)
        here.share(trial)
        study.tell(trial, value)
    assert there.fetch(study.best_trial).read_bytes() == b"weights of 1"
    assert len(list((tmp_path / "shared").iterdir())) == 2
    there.forget_beaten(study)
    assert len(list((tmp_path / "shared").iterdir())) == 1
    assert there.fetch(study.trials[0]) is None
    here.forget_beaten(study)  # the other one was first
    assert kept(tmp_path / "here") == [1]


def test_weights_that_were_not_shared_are_not_there(tmp_path):
    study = a_study(0.5)
    assert TrialWeights(tmp_path / "a").fetch(study.best_trial) is None
    assert TrialWeights(tmp_path / "a", shared=tmp_path / "shared").fetch(study.best_trial) is None


# --- what a search found


def test_a_search_without_one_finished_trial_says_why(tmp_path, said):
    study = a_study(None)
    add_trial(study, state=TrialState.FAIL, reason="not enough memory")
    with pytest.raises(SearchFailedError, match=r"none of 2 trials.*Reasons: not enough memory\. Give the search more"):
        search_record(study, TrialWeights(tmp_path), objectives=["macro_f1"], say=said.append)


def test_the_record_tells_every_trial_and_a_pruned_one_by_its_last_report(tmp_path, said):
    study = a_study(0.5, params={"rate": 2.0}, reported=(0.3, 0.5), seconds=3, proposed_by="the defaults")
    add_trial(study, reported=(0.4, 0.2), seconds=2, proposed_by="chance")
    found = search_record(study, TrialWeights(tmp_path), objectives=["macro_f1"], say=said.append)
    first, second = found.trials
    assert (first.state, first.values, first.last_macro_f1, first.epochs) == ("complete", [0.5], 0.5, 2)
    assert (first.parameters, first.seconds) == ({"rate": 2.0}, 3)
    assert (second.state, second.values, second.last_macro_f1, second.epochs) == ("pruned", None, 0.2, 2)
    assert found.seconds == 5 and found.proposed_by == {"the defaults": 1, "chance": 1}
    assert found.best.number == 0 and found.best.parameters == {"rate": 2.0}


def test_the_record_says_who_searched_and_what_stands_on_the_front(tmp_path, said):
    study = optuna.create_study(directions=["maximize", "minimize"])
    record = trained(0.3, 0.7)
    for values, params in (((0.6, 10), {"rate": 1.0}), ((0.7, 20), {"rate": 2.0}), ((0.65, 30), {"rate": 3.0})):
        add_trial(study, values=list(values), params=params, macro_f1=values[0], record=record.as_json())
    found = search_record(study, TrialWeights(tmp_path), objectives=["macro_f1", "latency"], say=said.append)
    assert (found.sampler, found.pruner, found.objectives) == ("TPESampler", None, ["macro_f1", "latency"])
    assert found.pareto_front == [
        {"number": 0, "values": [0.6, 10], "parameters": {"rate": 1.0}},
        {"number": 1, "values": [0.7, 20], "parameters": {"rate": 2.0}},
    ]
    assert (found.best.number, found.best.values, found.best.macro_f1) == (1, [0.7, 20], 0.7)
    assert (found.best.best_epoch, found.best.record) == (2, record)
    alone = search_record(a_study(0.5), TrialWeights(tmp_path), objectives=["macro_f1"], say=said.append)
    assert (alone.sampler, alone.pruner) == ("TPESampler", "MedianPruner") and alone.best.record is None


def test_the_record_says_why_a_trial_failed_what_ran_again_and_what_still_runs(tmp_path, said):
    study = a_study(0.5)
    add_trial(study, state=TrialState.FAIL, reason="made up")
    add_trial(study, 0.6, macro_f1=0.6, again=1)
    add_trial(study, state=TrialState.RUNNING)
    trials = search_record(study, TrialWeights(tmp_path), objectives=["macro_f1"], say=said.append).trials
    assert [trial.state for trial in trials] == ["complete", "fail", "complete", "running"]
    assert [trial.reason for trial in trials] == [None, "made up", None, None]
    assert [trial.again for trial in trials] == [None, None, 1, None]
    assert [trial.seconds for trial in trials] == [1, 1, 1, None]


@pytest.mark.parametrize("there", [True, False])
def test_weights_of_the_best_trial_that_are_not_here_are_missed_aloud(there, tmp_path, said):
    weights = TrialWeights(tmp_path)
    if there:
        leave_weights(weights, 1)
    found = search_record(a_study(0.5, 0.6), weights, objectives=["macro_f1"], say=said.append)
    assert found.best.checkpoint == ("trials/1.ckpt" if there else None)
    assert bool(said) is not there
    assert there or ("trial 1, the best, are not here" in said[0] and "artifacts=" in said[0])


# --- what is gone on from

DEFAULTS, OTHER = {"rate": 1.0}, {"rate": 2.0}


@pytest.mark.parametrize(("lead", "trained"), [(0.004, DEFAULTS), (0.02, OTHER)])
def test_the_defaults_are_trained_unless_they_are_clearly_beaten(lead, trained, said):
    trials = [a_trial(0, 0.5, DEFAULTS), a_trial(1, 0.5 + lead, OTHER)]
    found = a_search(0.5 + lead, number=1, trials=trials, parameters=OTHER)
    assert worth_training(found, DEFAULTS, say=said.append) == trained
    assert bool(said) == (trained == DEFAULTS)
    never_tried = replace(found, trials=[trials[1], replace(trials[0], state="fail")])
    assert worth_training(never_tried, DEFAULTS, say=said.append) == OTHER


def test_the_better_weights_stay_with_the_record_that_describes_them(said):
    of_trial = trained(0.3, 0.8, checkpoint="trials/4.ckpt", parameters=OTHER)
    found = a_search(0.8, seconds=30, number=4, checkpoint="trials/4.ckpt", record=of_trial)
    final = trained(0.6, 0.7, 0.1, train_seconds=20.0, parameters=DEFAULTS)
    record = better_of(final, found, say=said.append)
    assert (record.checkpoint, record.parameters, record.best_epoch) == ("trials/4.ckpt", OTHER, 2)
    assert (record.weights_from, record.total_seconds) == ("trial 4", 50)
    assert record.final_training["parameters"] == DEFAULTS and record.final_training["epochs"] == 3
    assert record.search.best.record is None  # it stands in the record itself
    assert "trial 4 stays: 0.800" in said[0]


@pytest.mark.parametrize("checkpoint", ["trials/4.ckpt", None])
def test_the_final_training_stays_where_the_best_trial_is_no_better_or_its_weights_are_not_here(checkpoint, said):
    found = a_search(0.7 if checkpoint else 0.9, seconds=30, checkpoint=checkpoint, record=trained(0.9))
    record = better_of(trained(0.6, 0.7, 0.1, train_seconds=20.0), found, say=said.append)
    assert (record.weights_from, record.final_training, record.total_seconds) == ("final training", None, 50)
    assert record.history["val_macro_f1"] == [0.6, 0.7, 0.1] and not said

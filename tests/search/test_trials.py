"""Promises about trials: which count, which is gone on with, what is said of them."""

import numpy as np
import optuna
import pytest
from made_up_trials import a_study, add_trial, trained
from optuna.trial import TrialState

from waferlab.errors import SearchFailedError
from waferlab.search.trial_files import TrialFiles
from waferlab.search.trials import (
    Validation,
    completed,
    counted_trials,
    pack_answers,
    search_record,
    study_seconds,
    take_up,
    to_go_on_with,
    trial_line,
    trial_record,
    unbeaten,
    unpack_answers,
    worth_keeping,
)
from waferlab.training.callbacks import History
from waferlab.training.checkpoints import CheckpointFiles

DEFAULTS, OTHER = {"rate": 1.0}, {"rate": 2.0}
LABELS, LOTS = np.arange(360) % 9, np.arange(360) // 18  # 20 lots with two maps of each class
VALIDATION = Validation(LABELS, LOTS)


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


def test_a_trial_that_goes_on_counts_the_seconds_of_the_one_that_was_cut_off():
    study = a_study()
    add_trial(study, 0.5, start=0, seconds=10)
    cut_off = add_trial(study, state=TrialState.FAIL, start=10, seconds=1000)  # the night is in these
    add_trial(study, 0.6, start=1010, seconds=5, again=cut_off.number, seconds_before=7.0)
    assert study_seconds(study) == 10 + 7 + 5


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_clock_that_jumps_in_a_trial_makes_it_neither_longer_nor_shorter(jump):
    study = a_study()
    add_trial(study, 0.5, start=0, seconds=10, noted=9.5)
    add_trial(study, 0.6, start=10, seconds=10 + jump, noted=9.5)
    add_trial(study, 0.7, start=20 + jump, seconds=10, noted=9.5)
    assert study_seconds(study) == pytest.approx(3 * 9.5)
    assert [trial_record(trial).seconds for trial in study.trials] == [9.5] * 3


@pytest.mark.parametrize(
    ("trials", "seconds"),
    [
        ([(0, 10), (0, 10)], 10),  # side by side
        ([(0, 10), (4, 10)], 14),
        ([(4, 10), (0, 10)], 14),  # in whichever order they are numbered
        ([(0, 10), (2, 3), (6, 8)], 14),  # one within another
        ([(0, 10), (100, 5)], 15),  # the nights between two sittings are not searched
    ],
)
def test_seconds_of_trials_side_by_side_count_once(trials, seconds):
    study = a_study()
    for start, lasted in trials:
        add_trial(study, 0.5, start=start, seconds=lasted)
    assert study_seconds(study) == seconds


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


def test_of_two_trials_that_end_at_once_each_has_its_own_number():
    study = a_study(0.5, 0.5)
    lines = [trial_line(study, trial, wanted=4, seconds_left=1.0) for trial in study.trials]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4"]


# --- which is gone on with


def wrong(*maps):
    """Answers to the validation maps that are wrong on some."""
    answers = LABELS.copy()
    answers[list(maps)] = (LABELS[list(maps)] + 1) % 9
    return answers


def against_the_defaults(lead, *, of_defaults=DEFAULTS, answers=True):
    """A study of the defaults, whose answers to 60 maps are wrong, and of a trial with fewer wrong, on other maps."""
    study, draw = a_study(), np.random.default_rng(0)
    theirs, others = draw.permutation(360)[:60], draw.permutation(360)[: 60 - lead]
    for maps, params, value in ((theirs, of_defaults, 0.5), (others, OTHER, 0.5 + lead / 360)):
        kept = {"answers": pack_answers(wrong(*maps))} if answers else {}
        add_trial(study, value, params=params, macro_f1=value, **kept)
    return study


@pytest.mark.parametrize(("lead", "number"), [(1, 0), (5, 0), (20, 1), (40, 1)])
def test_the_defaults_stay_unless_they_are_clearly_beaten_on_validation(lead, number):
    trial, _ = to_go_on_with(against_the_defaults(lead), DEFAULTS, VALIDATION)
    assert trial.number == number and trial.params == (OTHER if number else DEFAULTS)


@pytest.mark.parametrize(("difference", "number"), [(0.024, 0), (0.026, 1)])
def test_clearly_is_by_more_than_a_quarter_of_the_intervals_width(difference, number, monkeypatch):
    compared = []

    def compare(self, new, old):
        compared.append(((new != LABELS).sum(), (old != LABELS).sum()))
        return {"difference": difference, "interval": [difference - 0.05, difference + 0.05]}

    monkeypatch.setattr(Validation, "compare", compare)
    trial, why = to_go_on_with(against_the_defaults(20), DEFAULTS, VALIDATION)
    assert trial.number == number and compared == [(40, 60)]
    lead = f"trial 1 leads the defaults by {difference:.3f} [{difference - 0.05:.3f}, {difference + 0.05:.3f}]"
    assert why == lead + ("" if number else ", which is no more than its standard error: the defaults go on")


def test_answers_are_compared_map_by_map_and_lots_are_left_out_in_turn():
    found = VALIDATION.compare(wrong(), wrong(0, 1))
    assert found["n_groups"] == 20 and 0 < found["difference"] < 0.01
    low, high = found["interval"]
    assert low < found["difference"] < high


def test_where_the_defaults_did_not_come_to_their_end_the_best_goes_on():
    trial, why = to_go_on_with(against_the_defaults(1, of_defaults={"rate": 3.0}), DEFAULTS, VALIDATION)
    assert trial.number == 1 and why == "trial 1 is the best; the defaults were not tried to their end"
    study = a_study()
    add_trial(study, state=TrialState.PRUNED, params=DEFAULTS)
    add_trial(study, 0.1, params=OTHER)
    assert to_go_on_with(study, DEFAULTS, VALIDATION)[0].number == 1


def test_defaults_that_nobody_beats_go_on_and_of_two_such_trials_the_better_one():
    study = against_the_defaults(1)
    add_trial(study, 0.9, params=DEFAULTS)
    add_trial(study, 0.8, params=DEFAULTS)
    trial, why = to_go_on_with(study, DEFAULTS, VALIDATION)
    assert (trial.number, why) == (2, "no trial beats the defaults")


def test_trials_without_answers_are_compared_by_their_values():
    trial, why = to_go_on_with(against_the_defaults(1, answers=False), DEFAULTS, VALIDATION)
    assert (trial.number, why) == (1, "trial 1 is the best")


@pytest.mark.parametrize("maps", [0, 1, 10_000])
def test_answers_come_back_from_their_short_text(maps):
    answers = np.random.default_rng(0).integers(0, 9, maps)
    text = pack_answers(answers)
    assert unpack_answers(text).tolist() == answers.tolist() and unpack_answers(text).dtype == np.int64
    assert len(text) <= 20 + maps and text.isascii()


def test_worth_keeping_are_those_that_no_other_beats_and_the_defaults():
    assert worth_keeping(a_study(None), DEFAULTS) == set()
    study = a_study(0.2, 0.6, None, 0.4)
    assert worth_keeping(study, DEFAULTS) == {1}
    add_trial(study, 0.3, params=DEFAULTS)
    add_trial(study, 0.1, params=DEFAULTS)
    assert worth_keeping(study, DEFAULTS) == {1, 4}
    lost = add_trial(study, state=TrialState.FAIL)
    assert worth_keeping(study, DEFAULTS) == {1, 4, lost.number}  # until somebody finishes it
    again = add_trial(study, state=TrialState.RUNNING, again=lost.number)
    assert worth_keeping(study, DEFAULTS) == {1, 4, lost.number, again.number}  # it may be the best in a moment
    study.tell(again.number, 0.1)
    assert worth_keeping(study, DEFAULTS) == {1, 4}
    front = optuna.create_study(directions=["maximize", "minimize"])
    for values in ((0.5, 10), (0.6, 20), (0.55, 30)):
        add_trial(front, values=values)
    assert worth_keeping(front, DEFAULTS) == {0, 1}


@pytest.mark.parametrize("directions", [["maximize"], ["minimize"], ["maximize", "minimize", "minimize"]])
def test_unbeaten_are_those_that_optuna_calls_the_best(directions):
    study = optuna.create_study(directions=directions)
    assert unbeaten([], study.directions) == []
    for values in np.random.default_rng(0).integers(0, 4, (60, len(directions))):  # many are alike
        add_trial(study, values=values.tolist())
    assert unbeaten(completed(study), study.directions) == study.best_trials
    assert 1 < len(study.best_trials) < 60


def left_after(epochs, folder):
    """A state that a trial left after epochs with these scores."""
    history = History()
    history.epochs = [{"epoch": n + 1, "val_macro_f1": score} for n, score in enumerate(epochs)]
    file = folder / "0.state.ckpt"
    CheckpointFiles().save_checkpoint({"callbacks": {"History": history.state_dict() | {"seconds": 12.0}}}, file)
    return file


def test_tracker_and_pruner_are_told_the_epochs_that_a_trial_brings_along(tmp_path, said):
    trial = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner()).ask()
    take_up(trial, left_after([0.25, 0.5], tmp_path), track=said.append)
    assert said == [{"epoch": [1, 2], "val_macro_f1": [0.25, 0.5]}]
    (told,) = trial.study.trials
    assert told.intermediate_values == {0: 0.25, 1: 0.5} and told.user_attrs["seconds_before"] == 12.0


def test_a_trial_that_the_pruner_would_have_stopped_is_stopped_when_it_is_taken_up(tmp_path, said):
    trial = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.3)).ask()
    with pytest.raises(optuna.TrialPruned, match="epoch 1"):
        take_up(trial, left_after([0.4, 0.2, 0.4], tmp_path), track=said.append)


# --- what a search found


def recorded(study, folder, said, *, objectives=("macro_f1",), defaults=DEFAULTS):
    return search_record(
        study, TrialFiles(folder), objectives=objectives, defaults=defaults, validation=VALIDATION, workers=2,
        say=said.append,
    )  # fmt: skip


def test_a_search_without_one_finished_trial_says_why(tmp_path, said):
    study = a_study(None)
    add_trial(study, state=TrialState.FAIL, reason="not enough memory")
    with pytest.raises(SearchFailedError, match=r"none of 2 trials.*Reasons: not enough memory\. Give the search more"):
        recorded(study, tmp_path, said)


def test_the_record_tells_every_trial_and_a_pruned_one_by_its_last_report(tmp_path, said):
    study = a_study(0.5, params={"rate": 2.0}, reported=(0.3, 0.5), seconds=3, proposed_by="the defaults")
    add_trial(study, reported=(0.4, 0.2), seconds=2, proposed_by="chance")
    found = recorded(study, tmp_path, said)
    first, second = found.trials
    assert (first.state, first.values, first.last_macro_f1, first.epochs) == ("complete", [0.5], 0.5, 2)
    assert (first.parameters, first.seconds) == ({"rate": 2.0}, 3)
    assert (second.state, second.values, second.last_macro_f1, second.epochs) == ("pruned", None, 0.2, 2)
    assert found.pruned == 1 and found.workers == 2
    assert found.seconds == 5 and found.proposed_by == {"the defaults": 1, "chance": 1}
    assert found.best.number == 0 and found.best.parameters == {"rate": 2.0}


def test_the_record_says_who_searched_and_what_stands_on_the_front(tmp_path, said):
    study = optuna.create_study(directions=["maximize", "minimize"])
    record = trained(0.3, 0.7)
    for values, params in (((0.6, 10), {"rate": 1.0}), ((0.7, 20), {"rate": 2.0}), ((0.65, 30), {"rate": 3.0})):
        add_trial(study, values=list(values), params=params, macro_f1=values[0], record=record.as_json())
    found = recorded(study, tmp_path, said, objectives=("macro_f1", "latency"))
    assert (found.sampler, found.pruner, found.objectives) == ("TPESampler", None, ["macro_f1", "latency"])
    assert found.pareto_front == [
        {"number": 0, "values": [0.6, 10], "parameters": {"rate": 1.0}},
        {"number": 1, "values": [0.7, 20], "parameters": {"rate": 2.0}},
    ]
    assert (found.best.number, found.best.values, found.best.macro_f1) == (1, [0.7, 20], 0.7)
    assert (found.best.best_epoch, found.best.record) == (2, record)
    alone = recorded(a_study(0.5), tmp_path, said)
    assert (alone.sampler, alone.pruner) == ("TPESampler", "MedianPruner") and alone.best.record is None


def test_the_record_says_why_a_trial_failed_what_ran_again_and_what_still_runs(tmp_path, said):
    study = a_study(0.5)
    add_trial(study, state=TrialState.FAIL, reason="made up")
    add_trial(study, 0.6, macro_f1=0.6, again=1)
    add_trial(study, state=TrialState.RUNNING)
    trials = recorded(study, tmp_path, said).trials
    assert [trial.state for trial in trials] == ["complete", "fail", "complete", "running"]
    assert [trial.reason for trial in trials] == [None, "made up", None, None]
    assert [trial.again for trial in trials] == [None, None, 1, None]
    assert [trial.seconds for trial in trials] == [1, 1, 1, None]


@pytest.mark.parametrize("missing", [(), ("1.ckpt",), ("1.state.ckpt",)])
def test_what_the_best_trial_left_is_gone_on_from_or_missed_aloud(missing, tmp_path, said):
    study = a_study(0.5, 0.6, record=trained(0.6).as_json())
    for name in {"1.ckpt", "1.state.ckpt"}.difference(missing):
        (tmp_path / name).touch()
    found = recorded(study, tmp_path, said)
    assert found.best.number == 1 and found.best.goes_on is not bool(missing)
    if missing:
        assert "what trial 1, the best, left is not here: its parameters are trained anew" in said[0]
        assert "artifacts=" in said[0]
    else:
        assert not said


def test_a_trial_that_nothing_describes_is_not_gone_on_from(tmp_path, said):
    for name in ("0.ckpt", "0.state.ckpt"):
        (tmp_path / name).touch()
    assert not recorded(a_study(0.5), tmp_path, said).best.goes_on


def test_the_record_says_why_the_final_training_goes_on_from_that_trial(tmp_path, said):
    study = against_the_defaults(lead=5)
    found = recorded(study, tmp_path, said)
    assert found.best.number == 0 and found.best.parameters == DEFAULTS
    assert found.why == to_go_on_with(study, DEFAULTS, VALIDATION)[1] and found.why.endswith("the defaults go on")

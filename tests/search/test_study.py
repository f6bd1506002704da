"""Promises about a study: who proposes and who stops, told by made-up trials; what is kept survives a crash."""

import os
import resource
import signal

import optuna
import pytest
from made_up_trials import a_study, add_trial
from optuna.trial import TrialState

from waferlab.errors import ConfigError, DamagedFileError
from waferlab.search.database import bring_back_lost_trials, open_database
from waferlab.search.storage import SystemsLock, mend_journal, study_storage
from waferlab.search.study import (
    forget_lost_trials,
    make_pruner,
    make_sampler,
    open_study,
    proposed_by,
    run_again,
)
from waferlab.search.trials import counted_trials
from waferlab.tracking.processes import this_process

DEFAULTS = {"rate": 4e-3}
PORTFOLIO = ({"rate": 1e-3}, {"rate": 1e-2})


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "results/journal.log"


def opened(
    journal, *, go_on=False, fingerprint="one", pruner=None, sampler="auto", seed=0, storage=None, worker=0,
    portfolio=(), alone=False,
):  # fmt: skip
    return open_study(
        "made_up",
        storage=storage or study_storage(None, journal=journal, heartbeat=15),
        directions=["maximize"],
        sampler=lambda so_far: make_sampler(sampler, seed=seed, trials_so_far=so_far, shared=False, worker=worker),
        pruner=pruner or optuna.pruners.NopPruner(),
        first=[DEFAULTS, *portfolio],
        fingerprint=fingerprint,
        go_on=go_on,
        alone=alone,
    )


def objective(trial):
    trial.set_user_attr("proposed_by", proposed_by(trial))
    return 1 - rate_of(trial)


def rate_of(trial):
    return trial.suggest_float("rate", 1e-5, 1e-1, log=True)


def rates(study):
    return [trial.params["rate"] for trial in study.trials if trial.state == TrialState.COMPLETE]


# --- who stops


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("auto", optuna.pruners.SuccessiveHalvingPruner),
        ("median", optuna.pruners.MedianPruner),
        ("halving", optuna.pruners.SuccessiveHalvingPruner),
        ("hyperband", optuna.pruners.HyperbandPruner),
        ("none", optuna.pruners.NopPruner),
    ],
)
def test_the_pruner_is_the_one_that_was_asked_for(asked, kind):
    for epochs in (1, 4, 8):
        assert isinstance(make_pruner(asked, epochs=epochs), kind)


def epochs_of(pruner, *scripts):
    """How many epochs each trial of a study comes to, from its scores by epoch."""
    study, epochs = optuna.create_study(direction="maximize", pruner=pruner), []
    for scores in scripts:
        trial = study.ask()
        for epoch, score in enumerate(scores):
            trial.report(score, epoch)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, max(scores))
        epochs.append(epoch + 1)
    return epochs


GOOD, BAD, BEST = [0.5, 0.6, 0.7, 0.8], [0.1] * 4, [0.9] * 4


@pytest.mark.parametrize(
    ("pruner", "scripts", "epochs"),
    [
        ("none", (GOOD, GOOD, GOOD, BAD), [4, 4, 4, 4]),
        ("median", (GOOD, GOOD, GOOD, BAD), [4, 4, 4, 2]),  # not among the first three, nor after the first epoch
        ("auto", (BEST, GOOD, GOOD, BAD), [4, 2, 2, 2]),
        ("halving", (BEST, GOOD, GOOD, BAD), [4, 2, 2, 2]),  # of each three the best goes on after the second epoch
    ],
)
def test_unpromising_trials_are_stopped(pruner, scripts, epochs):
    assert epochs_of(make_pruner(pruner, epochs=4), *scripts) == epochs


@pytest.mark.parametrize(("last", "stopped"), [(0.45, False), (0.35, True)])
def test_halving_lets_the_best_third_go_on(last, stopped):
    study = optuna.create_study(direction="maximize", pruner=make_pruner("halving", epochs=8))
    for value in (0.5, 0.4, 0.3, 0.2, 0.1, last):
        trial = study.ask()
        trial.report(value, step=1)
        is_stopped = trial.should_prune()
        study.tell(trial, state=TrialState.PRUNED)
    assert is_stopped is stopped  # second of six is among the best third, third of six is not


@pytest.mark.parametrize(("epochs", "compared"), [(6, 2), (8, 2), (30, 10)])
def test_by_default_trials_are_compared_after_a_third_of_their_epochs_and_not_before(epochs, compared):
    """The scores of a trial until there do not matter: where it ends is what it has come to by then."""
    best, late, bad = [0.9] * epochs, [0.1] * (compared + 1) + [0.95] * epochs, [0.2] * epochs
    ended = epochs_of(make_pruner("auto", epochs=epochs), best, bad, late[:epochs])
    assert ended == [epochs, compared + 1, compared + 1]
    early = [0.1] * compared + [0.95] * epochs
    assert epochs_of(make_pruner("auto", epochs=epochs), best, bad, early[:epochs])[2] == epochs


# --- who proposes


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("random", optuna.samplers.RandomSampler),
        ("tpe", optuna.samplers.TPESampler),
        ("auto", optuna.samplers.TPESampler),
    ],
)
def test_the_sampler_is_the_one_that_was_asked_for(asked, kind, journal):
    for go_on in (False, True):
        assert type(opened(journal, sampler=asked, go_on=go_on).sampler) is kind


@pytest.mark.parametrize(("sampler", "last"), [("auto", "TPE"), ("random", "chance")])
@pytest.mark.parametrize("portfolio", [(), PORTFOLIO])
def test_each_trial_knows_who_proposed_it_which_is_tpe_from_the_fourth_on(
    sampler, last, portfolio, journal, monkeypatch
):
    asked = []
    relative = optuna.samplers.TPESampler._sample  # what TPE calls once it does more than to draw at random
    monkeypatch.setattr(
        optuna.samplers.TPESampler,
        "_sample",
        lambda self, study, trial, space: asked.append(trial.number) or relative(self, study, trial, space),
    )
    study = opened(journal, sampler=sampler, portfolio=portfolio)
    study.optimize(objective, n_trials=6)
    said = [trial.user_attrs["proposed_by"] for trial in study.trials]
    begin = ["the defaults", *(["the portfolio"] * 2 if portfolio else ["chance"] * 2)]
    assert said == [*begin, last, last, last]
    assert {number for number, who in enumerate(said) if who == "TPE"} == set(asked)


def test_the_defaults_are_tried_first_and_then_the_portfolio_in_its_order_and_nothing_twice(journal):
    portfolio = [*PORTFOLIO, dict(DEFAULTS)]  # which has them, too
    study = opened(journal, portfolio=portfolio)
    study.optimize(objective, n_trials=4)
    assert rates(study)[:3] == [DEFAULTS["rate"], 1e-3, 1e-2] and len(set(rates(study))) == 4
    resumed = opened(journal, portfolio=portfolio, go_on=True)
    resumed.optimize(objective, n_trials=1)
    assert len(set(rates(resumed))) == 5


def test_workers_draw_different_proposals_and_each_the_same_again(tmp_path):
    def drawn(run):
        opened(tmp_path / run)
        first, second = (opened(tmp_path / run, go_on=True, worker=worker) for worker in (1, 2))
        first.ask()  # has the defaults
        asked = [one.ask().suggest_float("rate", 1e-5, 1e-1, log=True) for one in (first, second, first, second)]
        return asked[::2], asked[1::2]

    one, two = drawn("a")
    assert len({*one, *two}) == 4
    assert drawn("b") == (one, two)


def test_proposals_follow_the_seed(tmp_path):
    def proposed(name, seed):
        study = opened(tmp_path / name, seed=seed)
        study.optimize(objective, n_trials=4)
        return rates(study)

    first, again, other = proposed("a", 3), proposed("b", 3), proposed("c", 4)
    assert first == again and first[0] == other[0] == DEFAULTS["rate"]
    assert len({*first, *other}) == 7


def test_a_study_that_is_gone_on_with_proposes_nothing_a_second_time(journal):
    opened(journal).optimize(objective, n_trials=4)
    resumed = opened(journal, go_on=True)
    resumed.optimize(objective, n_trials=4)
    assert len(set(rates(resumed))) == 8


def test_processes_that_share_a_study_do_not_draw_the_same():
    drawn = set()
    for _ in range(2):
        study = optuna.create_study(sampler=make_sampler("auto", seed=0, trials_so_far=0, shared=True))
        drawn.add(study.ask().suggest_float("rate", 0, 1))
    assert len(drawn) == 2


# --- what may be gone on with


def test_a_study_of_other_settings_or_data_is_refused_and_begun_anew_only_where_that_is_wanted(journal):
    opened(journal).optimize(objective, n_trials=2)
    with pytest.raises(ConfigError, match="other settings or data"):
        opened(journal, go_on=True, fingerprint="two")
    assert len(opened(journal, go_on=True).trials) == 2
    anew = opened(journal, fingerprint="two")
    assert [trial.state for trial in anew.trials] == [TrialState.WAITING]  # with the defaults


def test_trials_of_processes_that_are_gone_run_again_and_those_of_others_go_on(journal):
    study = opened(journal)
    of_the_dead, alive, elsewhere = (study.ask() for _ in range(3))
    of_the_dead.set_user_attr("process", f"{this_process().rpartition(' ')[0]} 1")  # our number, another start
    alive.set_user_attr("process", this_process())
    elsewhere.set_user_attr("process", "another-machine 1 1")
    study = opened(journal, go_on=True)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING, TrialState.WAITING]
    assert study.ask().user_attrs == {"again": 0, "proposed_by": "a trial that was cut off", "place": 0}


def test_a_trial_whose_loss_was_written_down_by_a_process_that_was_killed_then_runs_again(journal):
    study = opened(journal)
    study.tell(study.ask(), state=TrialState.FAIL)
    for _ in range(2):
        study = opened(journal, go_on=True)
        assert [trial.user_attrs.get("again") for trial in study.trials] == [None, 0], (
            "once, however often it is opened"
        )


def test_of_those_who_share_a_database_one_puts_back_what_was_lost_long_ago(tmp_path):
    study = opened(None, storage=open_database(f"sqlite:///{tmp_path}/study.db", heartbeat=1))
    study.tell(study.ask(), state=TrialState.FAIL)
    just_now = study.get_trials()[0]
    add_trial(study, state=TrialState.FAIL, start=0, params={"rate": 0.25})  # at the beginning of the year
    for _ in range(2):
        bring_back_lost_trials(study)
        assert [trial.user_attrs.get("again") for trial in study.trials] == [None, None, 1]
    assert just_now.state == TrialState.FAIL, "whoever found it out may be about to queue it"


def test_the_trial_of_a_worker_that_was_killed_fails_with_the_reason_and_is_not_run_again(journal):
    study = opened(journal)
    of_the_dead, alive, elsewhere = (study.ask() for _ in range(3))
    of_the_dead.set_user_attr("process", f"{this_process().rpartition(' ')[0]} 1")
    alive.set_user_attr("process", this_process())
    elsewhere.set_user_attr("process", "another-machine 1 1")
    forget_lost_trials(study, "its process was killed")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]
    assert study.trials[0].user_attrs["reason"] == "its process was killed"
    assert [trial.user_attrs.get("reason") for trial in study.trials[1:]] == [None, None]


def test_what_runs_again_comes_first_with_what_it_was_asked_to_try():
    study = a_study(0.5)
    cut_off = add_trial(study, state=TrialState.FAIL, params={"rate": 0.25})
    for _ in range(2):  # two who found it out
        run_again(study, cut_off)
    assert [one.state for one in study.trials[2:]] == [TrialState.WAITING]
    trial = study.ask()
    assert trial.suggest_float("rate", 0, 1) == 0.25 and trial.user_attrs["again"] == cut_off.number


@pytest.mark.parametrize("cut_off", [(0,), (0, 1), (1, 0), (2, 0, 1)])
def test_the_order_in_which_trials_are_compared_is_kept_when_some_are_cut_off(journal, cut_off):
    portfolio = [*PORTFOLIO, {"rate": 2e-2}]
    study, rates_in_order = opened(journal, portfolio=portfolio), [one["rate"] for one in (DEFAULTS, *portfolio)]
    for _ in range(2):
        begun = [study.ask() for _ in cut_off]
        assert [rate_of(trial) for trial in begun] == rates_in_order[: len(begun)]
        for number in cut_off:
            run_again(study, begun[number])
            study.tell(begun[number], state=TrialState.FAIL)
    assert [rate_of(study.ask()) for _ in rates_in_order] == rates_in_order
    assert not counted_trials(study) and not study.get_trials(states=(TrialState.WAITING,))


# --- the journal and the database


def test_a_last_line_that_a_crash_cut_off_is_mended_and_the_study_goes_on(journal):
    opened(journal).optimize(objective, n_trials=3)
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines(keepends=True)[-1][:20])
    mend_journal(journal)
    assert journal.read_bytes() == whole
    opened(journal, go_on=True).optimize(objective, n_trials=1)
    assert len(rates(opened(journal, go_on=True))) == 4


def test_a_program_that_was_killed_while_it_wrote_does_not_hold_the_next_up(journal):
    opened(journal)
    if (child := os.fork()) == 0:
        SystemsLock(journal).acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert opened(journal, go_on=True).trials


def test_of_lines_that_a_full_disk_does_not_take_nothing_is_left_and_with_room_the_study_goes_on(journal):
    study = opened(journal)
    whole = journal.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            study.ask()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert journal.read_bytes() == whole
    opened(journal, go_on=True).optimize(objective, n_trials=2)
    assert len(rates(opened(journal, go_on=True))) == 2


def test_a_study_whose_maker_was_killed_before_it_was_whole_gets_its_first_trials_once(journal):
    whole = opened(journal)
    trials, fingerprint = [t.system_attrs for t in whole.trials], whole.user_attrs["fingerprint"]
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines) + 1):
        journal.write_bytes(b"".join(lines[:cut]))
        for _ in range(2):
            study = opened(journal, go_on=True, alone=True)
            assert [t.system_attrs for t in study.trials] == trials
            assert study.user_attrs["fingerprint"] == fingerprint


def test_whoever_joins_a_study_waits_for_its_first_trials_and_gives_it_them_once_its_maker_must_be_dead(
    journal, monkeypatch
):
    first = [t.system_attrs for t in opened(journal, portfolio=PORTFOLIO).trials]
    lines = journal.read_bytes().splitlines(keepends=True)

    def its_maker_goes_on(seconds):
        with journal.open("ab") as file:
            file.writelines(lines[3:])

    journal.write_bytes(b"".join(lines[:3]))
    with monkeypatch.context() as patch:
        patch.setattr("waferlab.search.study.time.sleep", its_maker_goes_on)
        assert [t.system_attrs for t in opened(journal, go_on=True, portfolio=PORTFOLIO).trials] == first
    journal.write_bytes(b"".join(lines[:3]))
    monkeypatch.setattr("waferlab.search.study.PATIENCE", 0.2)
    assert [t.system_attrs for t in opened(journal, go_on=True, portfolio=PORTFOLIO).trials] == first


def test_whoever_is_alone_with_a_study_has_all_run_again_that_is_said_to_run(journal):
    study = opened(journal)
    study.ask()  # and was killed before it said who it is
    study.ask().set_user_attr("process", "the-same-disk-in-another-container 1 1")
    states = [trial.state for trial in opened(journal, go_on=True, alone=True).trials]
    assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.WAITING, TrialState.WAITING]


def test_a_damaged_line_of_the_journal_is_named_with_the_remedy(journal):
    opened(journal).optimize(objective, n_trials=1)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\0rubbish\n", *lines[4:]]))
    with pytest.raises(DamagedFileError, match=r"Line 4 of .*journal.log is damaged.*Move the file away"):
        opened(journal, go_on=True)


@pytest.mark.parametrize("content", [b"", b'{"a": 1}\n', b'{"a": 1}\n{"b": 2}\n'])
def test_a_whole_journal_stays_as_it_is_and_none_is_none(content, tmp_path):
    mend_journal(tmp_path / "none.log")
    assert not (tmp_path / "none.log").exists()
    file = tmp_path / "journal.log"
    file.write_bytes(content)
    mend_journal(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("url", ["no-database", "mysql+nothing://me:s3cret@127.0.0.1/studies"])
def test_a_storage_that_cannot_be_used_is_named_without_its_password(url):
    with pytest.raises(ConfigError, match="cannot be used") as said:
        open_database(url, heartbeat=15)
    assert "s3cret" not in str(said.value)


def test_who_finds_a_lost_trial_that_another_has_ended_meanwhile_goes_on(journal, monkeypatch):
    opened(journal).ask().set_user_attr("process", f"{this_process().rpartition(' ')[0]} 1")
    tell = optuna.Study.tell

    def come_second(study, number, **how):
        tell(study, number, **how)
        return tell(study, number, **how)

    monkeypatch.setattr(optuna.Study, "tell", come_second)
    study = opened(journal, go_on=True)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_a_trial_that_was_cut_off_does_not_compete_with_itself():
    def goes_on(*scores, cut_off=None):
        """Whether the last of some trials passes the first rung."""
        study = optuna.create_study(direction="maximize", pruner=make_pruner("auto", epochs=3))
        for number, score in enumerate(scores):
            trial = study.ask()
            trial.report(score, 1)
            stopped = trial.should_prune()
            if number == cut_off:
                run_again(study, trial)
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, **({"state": TrialState.PRUNED} if stopped else {"values": score}))
        return not stopped

    assert goes_on(0.80, 0.70, 0.85, 0.60, 0.65, 0.82)
    assert goes_on(0.80, 0.70, 0.85, 0.85, 0.60, 0.65, 0.82, cut_off=2)
    assert not goes_on(0.80, 0.70, 0.85, 0.85, 0.60, 0.65, 0.82)

"""An Optuna study: where it is kept, who proposes, who stops, and what becomes of trials that were cut off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from waferlab.errors import ConfigError
from waferlab.search.trials import lost_and_not_queued, was_lost
from waferlab.tracking.processes import still_runs

TPE_STARTS_AFTER = 3  # finished trials; Optuna's own default, 10, is more than most searches here have
PATIENCE = 10.0  # seconds that another process has to give a new study its first trials
REDUCTION = 3  # of the trials that reach a rung, one in so many goes on to the next, which is so many times as far


def open_study(
    name: str,
    *,
    storage: BaseStorage,
    directions: Sequence[str],
    sampler: Callable[[int], optuna.samplers.BaseSampler],
    pruner: optuna.pruners.BasePruner,
    first: Sequence[Mapping[str, Any]],
    fingerprint: str,
    go_on: bool,
    alone: bool = False,
) -> optuna.Study:
    """Creates a study, or takes it up again; trials of processes that are gone are put back into the queue.

    Args:
        name: in the storage.
        storage: see `study_storage`.
        directions: "maximize" or "minimize" of each objective.
        sampler: makes the one who proposes, told how many trials there are.
        pruner: who stops unpromising trials.
        first: parameters of the first trials: the defaults, and what has proved itself elsewhere.
        fingerprint: of settings and data; a study that was made with another one is refused.
        go_on: take up a study of that name; else it is deleted first.
        alone: nobody else can be at work on it now, so whatever is said to run was cut off.

    Raises:
        ConfigError: the study was made with other settings or data.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # of a trial that fails, our own line gives the reason
    if not go_on and name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    parts = {"study_name": name, "storage": storage, "pruner": pruner}
    try:  # of several processes on one study, exactly one makes it
        study, ours = optuna.create_study(directions=directions, **parts), True
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(**parts)
        ours = _left_half_made(study, patience=0 if alone else PATIENCE)
    if ours:
        study.set_user_attr("fingerprint", fingerprint)
        for number, parameters in enumerate(first):
            by = "the portfolio" if number else "the defaults"
            study.enqueue_trial(dict(parameters), user_attrs={"proposed_by": by}, skip_if_exists=True)
        study.set_user_attr("begun", True)
    if study.user_attrs.get("fingerprint", fingerprint) != fingerprint:
        raise ConfigError(
            f"The study {name} was made with other settings or data. Repeat the settings of that run, or choose "
            "another experiment_name; without storage=..., leaving out --resume searches anew, too."
        )
    study.sampler = sampler(len(study.get_trials(deepcopy=False)))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if alone or not still_runs(trial.user_attrs.get("process", "? 0 0")):
            with suppress(ValueError, UpdateFinishedTrialError):  # somebody else has done so at the same moment
                study.tell(trial.number, state=TrialState.FAIL)
            run_again(study, trial)
    if seconds_between_signs(study) is None:  # else those who share the study do it, see `bring_back_lost_trials`
        for trial in lost_and_not_queued(study):
            run_again(study, trial)
    return study


def _left_half_made(study: optuna.Study, *, patience: float) -> bool:
    """Whether whoever made the study seems to have been killed before it had its first trials."""
    given_up = time.monotonic() + patience
    while "begun" not in study.user_attrs:
        if time.monotonic() >= given_up:
            return True
        time.sleep(0.05)
    return False


def seconds_between_signs(study: optuna.Study) -> int | None:
    """Of life, of whoever runs a trial; None if the storage keeps none, as the journal of a single machine."""
    asked = getattr(study._storage, "get_heartbeat_interval", None)
    return asked() if asked else None


def forget_lost_trials(study: optuna.Study, reason: str) -> None:
    """Ends the trials of processes that are gone; they are not run again, as they may have been what was too much."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if not still_runs(trial.user_attrs.get("process", "? 0 0")):
            with suppress(ValueError, UpdateFinishedTrialError):  # another program has ended it just now
                optuna.Trial(study, trial._trial_id).set_user_attr("reason", reason)
                study.tell(trial.number, state=TrialState.FAIL)


@contextmanager
def causes_kept() -> Iterator[None]:
    """Lets through what really happened, where another error stands before it.

    An OSError of the journal, such as a full disk, while Optuna writes down how a trial ended: it then asserts that
    this cannot be.
    """
    try:
        yield
    except AssertionError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextmanager
def left_if_taken_away(say: Callable[[str], None], give_back: Callable[[], None]) -> Iterator[None]:
    """Leaves a trial that somebody else has ended meanwhile: whoever runs it was taken for dead.

    Args:
        say: prints a line.
        give_back: called for the place of that trial, which it does not need.
    """
    try:
        yield
    except (UpdateFinishedTrialError, ValueError) as error:
        if isinstance(error, ValueError) and not str(error).startswith("Cannot tell a "):
            raise
        give_back()
        say("  a trial of this worker was taken for lost, as it gave no sign of life for too long; it runs again")


def make_sampler(
    name: str, *, seed: int, trials_so_far: int, shared: bool, worker: int = 0
) -> optuna.samplers.BaseSampler:
    """Who proposes parameters: "random", or else TPE, which draws at random, too, until `TPE_STARTS_AFTER`.

    Seeded by the trials so far, too: one made anew on resuming would else propose again what it did before; and by the
    worker, as those side by side must not draw the same. A study that machines share is not seeded for that reason.
    """
    seeded = None if shared else int(np.random.SeedSequence([seed, trials_so_far, worker]).generate_state(1)[0])
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seeded)
    return optuna.samplers.TPESampler(seed=seeded, n_startup_trials=TPE_STARTS_AFTER)


class Halving(optuna.pruners.SuccessiveHalvingPruner):
    """Optuna's, for which trials that were cut off do not count: they run again, and would compete twice."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to be stopped."""
        return super().prune(_WithoutLost(study), trial)


class _WithoutLost:
    """A study as it would be had no trial been cut off."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *arguments: Any, **named: Any) -> list[FrozenTrial]:
        trials = self._study.get_trials(*arguments, **named)
        return [trial for trial in trials if not was_lost(trial) and "surplus" not in trial.user_attrs]


def make_pruner(name: str, *, epochs: int) -> optuna.pruners.BasePruner:
    """Who stops unpromising trials of so many epochs; see `ExperimentConfig.pruner`."""
    match name:
        case "auto":  # what survives is gone on with, so it costs nothing
            rung = max(1, epochs // REDUCTION)
            return Halving(min_resource=rung, reduction_factor=REDUCTION)
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
        case "halving":
            return Halving(min_resource=1, reduction_factor=3)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
    return optuna.pruners.NopPruner()


def proposed_by(trial: optuna.Trial) -> str:
    """Where a trial's parameters come from; TPE itself draws at random until it has seen enough trials."""
    if "proposed_by" in trial.user_attrs:  # it was put into the queue
        return trial.user_attrs["proposed_by"]
    seen = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    tpe = isinstance(trial.study.sampler, optuna.samplers.TPESampler)
    return "TPE" if tpe and len(seen) >= TPE_STARTS_AFTER else "chance"


def run_again(study: optuna.Study, trial: optuna.trial.BaseTrial) -> None:
    """Puts the parameters of a trial that was cut off back in the queue, once: all that it had, or was to have.

    It is the next one: pruning compares a trial with those before it, so their order is kept.
    """
    trials = study.get_trials(deepcopy=False)
    if any(other.user_attrs.get("again") == trial.number for other in trials):
        return  # somebody else has, while this process was stopped
    asked, place = trials[trial.number].system_attrs.get("fixed_params", {}), _place(trials[trial.number])
    again = {"again": trial.number, "proposed_by": "a trial that was cut off", "place": place}
    study.enqueue_trial(asked | trial.params, user_attrs=again)
    behind = [other for other in trials if other.state == TrialState.WAITING and _place(other) > place]
    for other in sorted(behind, key=_place):
        _move_to_the_end(study, other)


def _place(trial: FrozenTrial) -> int:
    """In the order of trials, of which one that runs again has that of the one that was cut off."""
    return trial.user_attrs.get("place", trial.number)


def _move_to_the_end(study: optuna.Study, waiting: FrozenTrial) -> None:
    """Optuna takes the waiting trial with the lowest number, so another one gets its parameters, with the highest."""
    with suppress(UpdateFinishedTrialError):  # somebody has begun it, and it has even ended
        if study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):  # nobody has begun it
            moved = {"again": waiting.number, "place": _place(waiting)}
            study.enqueue_trial(waiting.system_attrs.get("fixed_params", {}), user_attrs=waiting.user_attrs | moved)
            study._storage.set_trial_user_attr(waiting._trial_id, "surplus", True)
            study.tell(waiting.number, state=TrialState.FAIL)


def study_plots(study: optuna.Study, objectives: Sequence[str] = ("macro_f1",)) -> dict[str, Callable[[], Any]]:
    """Optuna's own plots that a study has enough trials for: history, slices, importances, Pareto front.

    Args:
        study: to be drawn.
        objectives: what its values are; with several, the plots are of the first, and two have a Pareto front.
    """
    from optuna.visualization import matplotlib as draw

    done = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
    first = {"target": lambda trial: trial.values[0], "target_name": objectives[0]} if len(objectives) > 1 else {}
    plots: dict[str, Callable[[], Any]] = {}
    if done:
        plots["history"] = partial(draw.plot_optimization_history, study, **first)
        plots["slices"] = partial(draw.plot_slice, study, **first)
    if len({trial.values[0] for trial in done}) >= 4:  # fewer tell nothing of what mattered
        plots["importances"] = partial(draw.plot_param_importances, study, **first)
    if len(objectives) == 2 and done:
        plots["pareto_front"] = partial(draw.plot_pareto_front, study, target_names=list(objectives))
    return plots

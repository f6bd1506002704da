"""Seconds: whether a search pays, how large it is, and how a time limit is shared."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from waferlab.records import SearchRecord, write_summary
from waferlab.search.trials import counted_trials, lost_and_not_queued, study_seconds, trial_seconds
from waferlab.training.checkpoints import read_json

EPOCHS_FOR_A_SEARCH = 15  # in all; where fewer fit into the time, what a search costs is missed more than it finds


@dataclass(frozen=True)
class SearchPlan:
    """How large a search is.

    Attributes:
        trials: at most so many.
        epochs: of a trial that is not stopped.
        seconds: for all of them; None for no limit.
        none_because: why there is no search at all; "" if there is one.
        until: when another program's search is over, which this one joins, in seconds since 1970; None for one's own.
    """

    trials: int
    epochs: int
    seconds: float | None = None
    none_because: str = ""
    until: float | None = None


def plan_search(
    *, trials: int, epochs: int, workers: int, seconds: float | None, share: float, seconds_an_epoch: float
) -> SearchPlan:
    """A search that leaves the winner the time to learn all that it can.

    About one trial in three goes on beyond a third of its epochs, and what the winner has learnt stays. So the search
    costs what the others take, which may be `share` of the time.

    Args:
        trials: that are wanted, at most.
        epochs: of a trial, at most.
        workers: processes that work side by side.
        seconds: that search and training may take together; None for no limit, which gives what is wanted.
        share: of the seconds that the search may take.
        seconds_an_epoch: as measured, of a trial.
    """
    if seconds is None:
        return SearchPlan(trials, epochs)
    fit = seconds / seconds_an_epoch
    if fit < EPOCHS_FOR_A_SEARCH:
        why = f"{fit:.0f} epochs fit into {seconds:.0f} s, and a search pays from {EPOCHS_FOR_A_SEARCH} on"
        return SearchPlan(0, 0, 0.0, why)
    go_on = 1 + math.log(trials)  # of trials in random order, so many are better than all before
    full_trials = trials / 3 + go_on * 2 / 3
    longest = min(epochs, max(3, int(fit * share * workers / full_trials)))
    return SearchPlan(trials, longest, seconds * share)


def planned_once(
    file: Path, make: Callable[[], SearchPlan], *, asked: Mapping[str, Any], look: bool
) -> SearchPlan:  # fmt: skip
    """A plan that a resumed run finds as it was, though the machine may be quicker or slower by now.

    Args:
        file: where it is kept.
        make: a plan for what is asked.
        asked: what it depends on besides the machine, in JSON's kinds; a plan for something else is made anew.
        look: whether there may be one.

    Raises:
        DamagedFileError: the file is damaged.
    """
    asked = json.loads(json.dumps(asked))
    if look and file.exists() and (kept := read_json(file)).get("asked") == asked:
        return SearchPlan(**kept["plan"])
    plan = make()
    write_summary(file, {"asked": asked, "plan": asdict(plan)})
    return plan


class SearchBudget:
    """When a search is over: as many trials as wanted have ended, or the time left is less than half a typical trial.

    Optuna's own `MaxTrialsCallback` and `timeout` know neither of trials that are run again nor of earlier sittings.
    Made before the workers are forked, which share it.

    Args:
        study: to spend it on; what its trials took in earlier sittings counts.
        plan: of the search.
        workers: processes that spend it.
    """

    def __init__(self, study: optuna.Study, plan: SearchPlan, *, workers: int = 1) -> None:
        self.plan, seconds = plan, plan.seconds
        self.deadline = None
        if seconds is not None:
            left = seconds - study_seconds(study) if plan.until is None else plan.until - time.time()
            self.deadline = time.monotonic() + max(0.0, left)
        # Pruned trials leave time to the others, so each may use twice its even share.
        self._of_a_trial = float("inf") if seconds is None else 2 * workers * seconds / plan.trials
        self._starts_left = multiprocessing.get_context("fork").Value("i", plan.trials - len(counted_trials(study)))

    def left(self) -> float:
        """Seconds until the search has to end; infinite without a limit."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def for_a_trial(self) -> float | None:
        """Seconds that the next trial may take; None without a limit."""
        return None if self.deadline is None else max(1.0, min(self.left(), self._of_a_trial))

    def wants_another(self, study: optuna.Study) -> bool:
        """Whether there are trials to be started, by anybody, and time for one."""
        done = [seconds for t in counted_trials(study) if (seconds := trial_seconds(t)) is not None]
        if self.left() < max(0.5 * sum(done) / max(1, len(done)), 1e-9):
            return False
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))  # of others who share the study, too
        return len(done) + len(running) + len(lost_and_not_queued(study)) < self.plan.trials

    def starts_another(self, study: optuna.Study) -> bool:
        """Whether whoever asks may start a trial; each that is told so is counted, in whichever process it asks."""
        if not self.wants_another(study):
            return False
        with self._starts_left.get_lock():
            if self._starts_left.value <= 0:
                return False
            self._starts_left.value -= 1
            return True

    def is_one_too_many(self, study: optuna.Study, trial: optuna.Trial) -> bool:
        """Whether another machine has taken the last place at the same moment, a little earlier; it is given back."""
        trials = study.get_trials(deepcopy=False)
        counted = {t.number for t in (*counted_trials(study), *lost_and_not_queued(study))}
        ours = trials[trial.number]

        def has_a_place(other: optuna.trial.FrozenTrial) -> bool:
            earlier = (other.datetime_start, other.number) < (ours.datetime_start, ours.number)
            return other.number in counted or (other.state == TrialState.RUNNING and earlier)

        if sum(has_a_place(other) for other in trials if other.state != TrialState.WAITING) < self.plan.trials:
            return False
        self.give_back()
        return True

    def give_back(self) -> None:
        """Somebody else has, or will have, the place of a trial that was started here."""
        with self._starts_left.get_lock():
            self._starts_left.value += 1


def seconds_by_merit(
    model_type: str, searches: Mapping[str, SearchRecord], *, models: int, limit: float, favourite_share: float
) -> float:
    """What is left after all searches: `favourite_share` of it for the model that did best, the rest in equal parts.

    A model that is the only one has all of it. One that had no search has a part, too: it is so slow that too few of
    its epochs would have fitted.
    """
    left = max(float(models), limit - sum(search.seconds for search in searches.values()))
    if models == 1:
        return left
    favourite = max(searches, key=lambda name: searches[name].best.macro_f1)
    return left * favourite_share if model_type == favourite else left * (1 - favourite_share) / (models - 1)

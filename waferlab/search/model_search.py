"""The search for one model's parameters: a study, its workers, what comes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna

from waferlab.config import OBJECTIVES, ExperimentConfig
from waferlab.errors import SurplusTrialError, TrialFailedError
from waferlab.records import SearchRecord
from waferlab.search.budget import SearchBudget, SearchPlan
from waferlab.search.storage import study_storage
from waferlab.search.study import (
    causes_kept,
    forget_lost_trials,
    left_if_taken_away,
    make_pruner,
    make_sampler,
    open_study,
)
from waferlab.search.told import Listener
from waferlab.search.trial_files import TrialFiles
from waferlab.search.trials import (
    Validation,
    lost_and_not_queued,
    search_record,
    seconds_noted,
    trial_line,
    was_lost,
    worth_keeping,
)
from waferlab.search.workers import workers_for
from waferlab.terminal import Terminal
from waferlab.tracking.runs import NoRuns, Run, RunTree
from waferlab.training.side_by_side import Tell, side_by_side

LOOK_EVERY = 1.0  # seconds, at what others do
Objective = Callable[[optuna.Trial], float | tuple[float, ...]]


@dataclass
class ModelSearch:
    """Trials of one model, side by side, all in one study.

    Attributes:
        model_type: a name of `MODEL_REGISTRY`.
        config: of the run.
        plan: how large the search is.
        files: what trials leave.
        defaults: parameters of the first trial.
        portfolio: parameters of the next.
        fingerprint: of settings and data; a study that was made with others is refused.
        run: of the model in the tracker, above those of its trials.
        leads: this program trains the winner, so it waits for all who share the study; else it works for one that does.
        study: where trials are written down.
        workers: processes that run trials.
        budget: what they share.
    """

    model_type: str
    config: ExperimentConfig
    plan: SearchPlan
    files: TrialFiles
    defaults: Mapping[str, Any]
    portfolio: Sequence[Mapping[str, Any]]
    fingerprint: str
    run: Run | None = None
    leads: bool = True

    def __post_init__(self) -> None:
        self.study = self._open_study()
        self.workers = min(workers_for(self.config), self.plan.trials)
        self.budget = SearchBudget(self.study, self.plan, workers=self.workers)

    def _open_study(self, worker: int = 0) -> optuna.Study:
        """Made by the first, and taken up by the workers: a connection to a database cannot be inherited."""
        config = self.config
        return open_study(
            f"{config.experiment_name}/{self.model_type}",
            storage=study_storage(
                config.storage, journal=config.results_dir / "optuna_journal.log", heartbeat=config.heartbeat
            ),
            directions=[OBJECTIVES[objective] for objective in config.objectives],
            sampler=lambda so_far: make_sampler(
                config.sampler, seed=config.seed, trials_so_far=so_far, shared=config.storage is not None, worker=worker
            ),
            pruner=make_pruner(config.pruner, epochs=self.plan.epochs),
            first=[self.defaults, *self.portfolio][: self.plan.trials],
            fingerprint=self.fingerprint,
            go_on=config.resume or config.storage is not None or worker > 0,
            alone=config.storage is None and worker == 0,  # this run holds the folder
        )

    def optimize(
        self, objective: Objective, *, terminal: Terminal, runs: RunTree | NoRuns, become_worker: Callable[[Tell], None]
    ) -> None:
        """Runs trials until the budget is used up.

        Args:
            objective: trains one.
            terminal: where a line is printed for each.
            runs: that workers' runs go to.
            become_worker: called in each forked process, before its first trial, with what tells this one.

        Raises:
            KeyboardInterrupt: interrupted; trials that were cut off are in the queue again.
        """
        shared = self.config.storage is not None
        self._forget_beaten(self.study)  # and what an earlier search has left
        if shared and self.leads:
            self._tell_who_joins(runs)
        with causes_kept(), self._lost_trials_watched():
            self._run_all(objective, terminal=terminal, runs=runs, become_worker=become_worker)
            while shared and self.leads and self._others_are_at_work():
                if self.budget.wants_another(self.study):  # one of theirs was lost
                    self._run_all(objective, terminal=terminal, runs=runs, become_worker=become_worker)
        for lost in (trial for trial in self.study.get_trials(deepcopy=False) if was_lost(trial) and self.leads):
            runs.end_lost(f"{self.study.study_name}/{lost.number}", reason="its worker was gone")

    def _run_all(
        self, objective: Objective, *, terminal: Terminal, runs: RunTree | NoRuns, become_worker: Callable[[Tell], None]
    ) -> None:
        """As many trials side by side as there are workers, until none is to be started."""
        if self.workers == 1:
            self._run_trials(objective, self.study, say=terminal.say)
            return

        def work(number: int, tell: Tell) -> None:
            become_worker(tell)
            self._run_trials(objective, self._open_study(number + 1), say=lambda line: tell("say", line, None))

        lost = partial(forget_lost_trials, self.study)
        side_by_side(work, workers=self.workers, hear=Listener(runs, self.run, terminal, lost=lost).hear)

    def _run_trials(self, objective: Objective, study: optuna.Study, *, say: Callable[[str], None]) -> None:
        """One trial after the other."""

        def run(trial: optuna.Trial) -> float | tuple[float, ...]:
            if self.budget.is_one_too_many(study, trial):
                trial.set_user_attr("surplus", True)
                raise SurplusTrialError
            with seconds_noted(trial):
                return objective(trial)

        def report(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            self._forget_beaten(study)
            if "surplus" not in trial.user_attrs:
                say(trial_line(study, trial, wanted=self.plan.trials, seconds_left=self.budget.left()))

        while self.budget.starts_another(study):
            with left_if_taken_away(say, self.budget.give_back):
                study.optimize(
                    run, n_trials=1, callbacks=[report], catch=(TrialFailedError, SurplusTrialError),
                    gc_after_trial=True,
                )  # fmt: skip

    def _forget_beaten(self, study: optuna.Study) -> None:
        self.files.forget_all_but(worth_keeping(study, self.defaults), study)

    # --- with others

    def _tell_who_joins(self, runs: RunTree | NoRuns) -> None:
        """Leaves in the study what a worker elsewhere has to know."""
        seconds = self.budget.left()
        self.study.set_user_attr("search", {
            "config": self.config.as_plain(),
            "plan": {"trials": self.plan.trials, "epochs": self.plan.epochs, "seconds": self.plan.seconds},
            "until": None if math.isinf(seconds) else time.time() + seconds,
            "run": None if self.run is None else runs.run_id(self.run),
        })  # fmt: skip

    def _lost_trials_watched(self) -> AbstractContextManager[None]:
        if self.config.storage is None:
            return nullcontext()
        from waferlab.search.database import lost_trials_watched

        return lost_trials_watched(self.study)

    def _others_are_at_work(self) -> bool:
        """Waits a moment for those who share the study; whether a trial of theirs still runs, or is to be run again."""
        if self.budget.left() <= 0:
            return False
        time.sleep(LOOK_EVERY)
        running = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        return bool(running or lost_and_not_queued(self.study)) or self.budget.wants_another(self.study)

    def record(self, validation: Validation, *, say: Callable[[str], None]) -> SearchRecord:
        """What the search did and found.

        Raises:
            SearchFailedError: not one trial came to its end.
        """
        return search_record(
            self.study, self.files, objectives=self.config.objectives, defaults=self.defaults, validation=validation,
            workers=self.workers, say=say,
        )  # fmt: skip

"""The search for one model's parameters: a study, its workers, what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna

from waferlab.config import OBJECTIVES, ExperimentConfig
from waferlab.errors import TrialFailedError
from waferlab.records import SearchRecord
from waferlab.search.budget import SearchBudget, SearchPlan
from waferlab.search.study import (
    forget_lost_trials,
    interrupts_kept,
    make_pruner,
    make_sampler,
    open_study,
    study_storage,
)
from waferlab.search.trial_files import TrialFiles
from waferlab.search.trials import Validation, search_record, trial_line, worth_keeping
from waferlab.search.workers import workers_for
from waferlab.terminal import Terminal
from waferlab.tracking.runs import NoRuns, Run, RunTree
from waferlab.training.side_by_side import Listener, Tell, side_by_side

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

    def __post_init__(self) -> None:
        self.study = self._open_study()
        self.workers = min(workers_for(self.config), self.plan.trials)
        self.budget = SearchBudget(self.study, self.plan, workers=self.workers)

    def _open_study(self, worker: int = 0) -> optuna.Study:
        """Made by the first, and taken up by the workers: a connection to a database cannot be inherited."""
        config = self.config
        return open_study(
            f"{config.experiment_name}/{self.model_type}",
            storage=study_storage(config.storage, journal=config.results_dir / "optuna_journal.log"),
            directions=[OBJECTIVES[objective] for objective in config.objectives],
            sampler=lambda so_far: make_sampler(
                config.sampler, seed=config.seed, trials_so_far=so_far, shared=config.storage is not None, worker=worker
            ),
            pruner=make_pruner(config.pruner, epochs=self.plan.epochs),
            first=[self.defaults, *self.portfolio][: self.plan.trials],
            fingerprint=self.fingerprint,
            go_on=config.resume or config.storage is not None or worker > 0,
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
        with interrupts_kept():
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

        def report_and_stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            self.files.forget_all_but(worth_keeping(study, self.defaults), study)
            say(trial_line(study, trial, wanted=self.plan.trials, seconds_left=self.budget.left()))
            if not self.budget.starts_another(study):
                study.stop()

        if self.budget.starts_another(study):
            study.optimize(objective, callbacks=[report_and_stop], catch=(TrialFailedError,), gc_after_trial=True)

    def record(self, validation: Validation, *, say: Callable[[str], None]) -> SearchRecord:
        """What the search did and found.

        Raises:
            SearchFailedError: not one trial came to its end.
        """
        return search_record(
            self.study, self.files, objectives=self.config.objectives, defaults=self.defaults, validation=validation,
            workers=self.workers, say=say,
        )  # fmt: skip

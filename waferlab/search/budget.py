"""Seconds: how a time limit is shared among searches, trials and final trainings."""

from __future__ import annotations

import time
from collections.abc import Mapping

import optuna

from waferlab.records import SearchRecord
from waferlab.search.trials import counted_trials, study_seconds


class SearchBudget:
    """When a search is over: as many trials as wanted have ended, or the time left is less than half a typical trial.

    Optuna's own `MaxTrialsCallback` and `timeout` know neither of trials that are run again nor of earlier sittings.

    Args:
        study: to spend it on; what its trials took in earlier sittings counts.
        wanted: number of trials.
        seconds: for all of them, or None for no limit.
    """

    def __init__(self, study: optuna.Study, *, wanted: int, seconds: float | None = None) -> None:
        self._study, self.wanted = study, wanted
        self.deadline = None if seconds is None else time.monotonic() + max(0.0, seconds - study_seconds(study))
        # Pruned trials leave time to the others, so each may use twice its even share.
        self._of_a_trial = float("inf") if seconds is None else 2 * seconds / wanted

    def left(self) -> float:
        """Seconds until the search has to end; infinite without a limit."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def for_a_trial(self) -> float | None:
        """Seconds that the next trial may take; None without a limit."""
        return None if self.deadline is None else max(1.0, min(self.left(), self._of_a_trial))

    def used_up(self) -> bool:
        """Whether another trial is not worth its start."""
        done = len(counted_trials(self._study))
        return done >= self.wanted or self.left() < max(0.5 * study_seconds(self._study) / max(1, done), 1e-9)


def seconds_by_merit(
    model_type: str, searches: Mapping[str, SearchRecord], *, limit: float, favourite_share: float
) -> float:
    """What is left after all searches: `favourite_share` of it for the model that did best, the rest in equal parts."""
    left = max(float(len(searches)), limit - sum(search.seconds for search in searches.values()))
    favourite = max(searches, key=lambda name: searches[name].best.macro_f1)
    return left * favourite_share if model_type == favourite else left * (1 - favourite_share) / (len(searches) - 1)

"""Trials, searches and trainings that never were, for what is done with them afterwards."""

import datetime
import time

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from waferlab.records import BestTrial, SearchRecord, StartingWeights, TrainingRecord

MIDNIGHT = datetime.datetime(2026, 1, 1)


def add_trial(
    study,
    value=None,
    *,
    state=None,
    start=None,
    seconds=1.0,
    noted=None,
    params=None,
    values=None,
    reported=(),
    **user_attrs,
):
    """Adds a trial to a study as if it had run, and returns it; one without a value was pruned.

    It began `start` seconds after midnight, or else when all before it had ended; `noted` are the seconds that it has a
    note of, where its dates may say something else.
    """
    if state is None:  # RUNNING is 0
        state = TrialState.PRUNED if value is None and values is None else TrialState.COMPLETE
    params, ended = params or {}, [t.datetime_complete for t in study.trials if t.datetime_complete]
    start = max(ended, default=MIDNIGHT) if start is None else MIDNIGHT + datetime.timedelta(seconds=start)
    if noted is not None:
        user_attrs["clock"] = {"seconds": noted, "end": (start + datetime.timedelta(seconds=noted)).timestamp()}
    study.add_trial(
        FrozenTrial(
            number=-1, trial_id=-1, state=state, value=value, values=values,
            datetime_start=start if state != TrialState.WAITING else None,
            datetime_complete=start + datetime.timedelta(seconds=seconds) if state.is_finished() else None,
            params=params, distributions={name: FloatDistribution(0, 1e6) for name in params},
            user_attrs=user_attrs, system_attrs={}, intermediate_values=dict(enumerate(reported)),
        )
    )  # fmt: skip
    return study.get_trials(deepcopy=False)[-1]


def a_study(*values, direction="maximize", **more):
    """A study whose trials came to these values; None is a pruned one. All are alike in the rest."""
    study = optuna.create_study(direction=direction)
    for value in values:
        add_trial(study, value, **{"macro_f1": value, **more})
    return study


def trained(*scores, **more):
    """The record of a training with these validation scores, one an epoch."""
    return TrainingRecord(
        **{
            "model_type": "made_up",
            "parameters": {},
            "weights": StartingWeights("random", reason="made up"),
            "precision": "32-true",
            "n_parameters": 1,
            "epochs": len(scores),
            "best_epoch": 1 + scores.index(max(scores)),
            "train_seconds": 1.0,
            "history": {"val_macro_f1": list(scores)},
            "checkpoint": "best.ckpt",
            "checkpoint_sha256": "0" * 64,
            **more,
        }
    )


def a_search(macro_f1=0.5, *, seconds=0.0, trials=(), number=0, **best):
    """The record of a search that a trial with this macro F1 came out of."""
    best = {"parameters": {}, "goes_on": False, "best_epoch": 1, "record": None, **best}
    return SearchRecord(
        study="made_up", sampler="TPESampler", pruner=None, proposed_by={}, pruned=0, workers=1,
        objectives=["macro_f1"], seconds=seconds,
        best=BestTrial(number=number, values=[macro_f1], macro_f1=macro_f1, **best), why="made up",
        pareto_front=[], trials=list(trials),
    )  # fmt: skip


class Clock:
    """Stands for the module `time`: moves only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)

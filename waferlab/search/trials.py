"""Trials: what a search asks them for, counts, keeps and prints."""

from __future__ import annotations

import time
from typing import Any

import optuna
from optuna.trial import TrialState

from waferlab.models.registry import own_search_space


def suggest_parameters(
    trial: optuna.trial.BaseTrial, model_type: str, *, batch_size: int, pretrained: bool = True
) -> dict[str, Any]:
    """Asks a trial for the shared parameters and for the architecture's own; `batch_size` is one more to choose.

    Without `pretrained` weights to start from, it is not asked for what makes no sense without them.
    """
    shared = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True),
        "batch_size": trial.suggest_categorical("batch_size", tuple(sorted({16, 32, 64, batch_size}))),
        "dropout": trial.suggest_float("dropout", 0.1, 0.6),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
    }
    own = own_search_space(model_type, pretrained=pretrained)
    return shared | {name: trial.suggest_categorical(name, values) for name, values in own.items()}


def completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)


def counted_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that came to an end of their own: those that were cut off run again and are not counted."""
    trials = study.get_trials(deepcopy=False)
    run_again = {t.user_attrs.get("again") for t in trials}
    return [t for t in trials if t.state.is_finished() and t.number not in run_again]


def study_seconds(study: optuna.Study) -> float:
    """Seconds that finished trials took, over all sittings and processes."""
    done = [t.duration for t in counted_trials(study) if t.duration is not None]
    return sum(duration.total_seconds() for duration in done)


def trial_record(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """What the summary keeps of a trial; a pruned one has its last reported value."""
    reported = trial.intermediate_values
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": trial.values if trial.state == TrialState.COMPLETE else None,
        "last_macro_f1": reported[max(reported)] if reported else None,
        "epochs": len(reported),
        "parameters": trial.params,
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        **{key: trial.user_attrs[key] for key in ("reason", "again", "proposed_by") if key in trial.user_attrs},
    }


def trial_line(study: optuna.Study, trial: optuna.trial.FrozenTrial, *, wanted: int, deadline: float | None) -> str:
    """One line for the terminal: number, state, value, best so far, parameters, time left."""
    done = counted_trials(study)
    best = max((t.values[0] for t in completed(study)), default=None)
    last = trial.values[0] if trial.values else None
    value = "  -  " if last is None else f"{last:.3f}"
    left = max(0, wanted - len(done)) * study_seconds(study) / max(1, len(done))
    left = left if deadline is None else max(0.0, min(left, deadline - time.monotonic()))
    shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    return (
        f"  trial {len(done)}/{wanted}  {trial.state.name.lower():8}  {value}  "
        f"best {'  -  ' if best is None else f'{best:.3f}'}  {shown}  about {left:.0f} s left"
        + (f"  ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else "")
    )

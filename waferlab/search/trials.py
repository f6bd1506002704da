"""Trials: which count, what is kept of them, and which of them is worth going on with."""

from __future__ import annotations

import base64
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from waferlab.data.maps import CLASS_NAMES
from waferlab.errors import SearchFailedError, TrialFailedError
from waferlab.evaluation.metrics import compare_macro_f1
from waferlab.evaluation.predictions import Predictions
from waferlab.records import BestTrial, SearchRecord, TrainingRecord, TrialRecord
from waferlab.search.trial_files import TrialFiles, repeated_by
from waferlab.training.callbacks import History
from waferlab.training.checkpoints import read_checkpoint


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to their end."""
    return study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to an end of their own; those that were cut off run again and are not counted."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state.is_finished() and not was_lost(t) and "surplus" not in t.user_attrs]


def was_lost(trial: FrozenTrial) -> bool:
    """Whether a trial failed for no reason of its own: whoever ran it was gone, or interrupted."""
    return trial.state == TrialState.FAIL and not {"reason", "surplus"} & trial.user_attrs.keys()


def lost_and_not_queued(study: optuna.Study) -> list[FrozenTrial]:
    """Lost trials that nobody has put back in the queue so far: whoever was about to may be gone as well."""
    trials = study.get_trials(deepcopy=False)
    queued = {trial.user_attrs.get("again") for trial in trials}
    return [trial for trial in trials if was_lost(trial) and trial.number not in queued]


def trial_tag(trial: optuna.Trial) -> dict[str, str]:
    """By which a trial's run is found in the tracker by others who share the study."""
    return {"trial": f"{trial.study.study_name}/{trial.number}"}


@contextmanager
def seconds_noted(trial: optuna.Trial) -> Iterator[None]:
    """Notes how long a trial takes that comes to an end of its own.

    By the clock that nobody sets: a machine's date may jump, and by its dates a trial would take an hour then. The end
    is in seconds since 1970, which mean the same in winter and in summer, and on machines elsewhere.
    """
    started = time.monotonic()

    def note() -> None:
        trial.set_user_attr("clock", {"seconds": time.monotonic() - started, "end": time.time()})

    try:
        yield
    except (optuna.TrialPruned, TrialFailedError):
        note()
        raise
    note()


def trial_seconds(trial: FrozenTrial) -> float | None:
    """How long a finished trial took, by its dates where there is no note of it; None of a trial without an end."""
    if clock := trial.user_attrs.get("clock"):
        return clock["seconds"]
    return None if trial.duration is None else trial.duration.total_seconds()


def study_seconds(study: optuna.Study) -> float:
    """Seconds in which a trial was running that has come to its end: those of trials side by side count once.

    One that went on where another was cut off has the seconds of that one, too.
    """
    seconds, until, spans = 0.0, -math.inf, []
    for trial in counted_trials(study):
        if (lasted := trial_seconds(trial)) is not None:
            clock = trial.user_attrs.get("clock")
            end = clock["end"] if clock else trial.datetime_complete.timestamp()
            spans.append((end - lasted - trial.user_attrs.get("seconds_before", 0.0), end))
    for start, end in sorted(spans):
        seconds += max(0.0, end - max(until, start))
        until = max(until, end)
    return seconds


def trial_line(study: optuna.Study, trial: FrozenTrial, *, wanted: int, seconds_left: float) -> str:
    """One line for the terminal: number, state, value, best so far, parameters, time left (at most `seconds_left`).

    Of a pruned trial the value is the last that it reported.
    """
    done = counted_trials(study)
    place = sum(other.datetime_complete <= trial.datetime_complete for other in done)  # others may have ended since
    best = max((t.values[0] for t in completed(study)), default=None)
    reported = trial.intermediate_values
    last = trial.values[0] if trial.values else reported[max(reported)] if reported else None
    value = "  -  " if last is None else f"{last:.3f}"
    left = max(0.0, min(max(0, wanted - len(done)) * study_seconds(study) / max(1, len(done)), seconds_left))
    shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    return (
        f"  trial {place}/{wanted}  {trial.state.name.lower():8}  {value}  "
        f"best {'  -  ' if best is None else f'{best:.3f}'}  {shown}  about {left:.0f} s left"
        + (f"  ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else "")
    )


# ---------------------------------------------------------------------------------------- which of them is gone on with


@dataclass(frozen=True)
class Validation:
    """The maps that trials are compared on.

    Attributes:
        labels: int64 [N], their classes.
        lots: int64 [N], their lots.
    """

    labels: np.ndarray
    lots: np.ndarray

    def compare(self, new: np.ndarray, old: np.ndarray) -> dict[str, Any]:
        """See `compare_macro_f1`, of answers, int [N] each."""
        certain = np.eye(len(CLASS_NAMES))
        new, old = (Predictions(certain[answers], self.labels, self.lots, CLASS_NAMES) for answers in (new, old))
        return compare_macro_f1(new, old)


def pack_answers(answers: np.ndarray) -> str:
    """Class numbers as a short text, which every storage of a study can keep."""
    return base64.b85encode(zlib.compress(answers.astype(np.uint8).tobytes(), 9)).decode()


def unpack_answers(text: str) -> np.ndarray:
    """What `pack_answers` was given, as int64."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8).astype(np.int64)


def to_go_on_with(study: optuna.Study, defaults: Mapping[str, Any], validation: Validation) -> tuple[FrozenTrial, str]:
    """The best trial, if its answers on validation are better than those of the default parameters beyond doubt.

    Of many trials one is ahead by chance. So it has to lead by more than a standard error of the difference, which is
    that of the two sets of answers to the same maps, lot by lot: about a quarter of the width of its 95% interval.

    Returns:
        The trial, and why it.

    Raises:
        ValueError: no trial is complete.
    """
    best = max(study.best_trials, key=lambda trial: trial.values[0])
    ours = [trial for trial in completed(study) if trial.params == defaults]
    if not ours:
        return best, f"trial {best.number} is the best; the defaults were not tried to their end"
    default = max(ours, key=lambda trial: trial.values[0])
    if best.params == defaults:
        return default, "no trial beats the defaults"
    if not all("answers" in trial.user_attrs for trial in (best, default)):
        return best, f"trial {best.number} is the best"
    found = validation.compare(*(unpack_answers(trial.user_attrs["answers"]) for trial in (best, default)))
    low, high = found["interval"]
    lead = f"trial {best.number} leads the defaults by {found['difference']:.3f} [{low:.3f}, {high:.3f}]"
    if found["difference"] > (high - low) / 4:
        return best, lead
    return default, f"{lead}, which is no more than its standard error: the defaults go on"


def worth_keeping(study: optuna.Study, defaults: Mapping[str, Any]) -> set[int]:
    """The numbers of the trials that may still be gone on with.

    Those that no other beats, the defaults, and what was cut off and is not finished yet.
    """
    trials = study.get_trials(deepcopy=False)
    lost = lost_and_not_queued(study)
    to_finish = [trial for trial in trials if not trial.state.is_finished()] + lost
    cut_off = {n for trial in to_finish for n in repeated_by(trial, trials)}
    cut_off |= {trial.number for trial in to_finish if trial.state != TrialState.WAITING}  # which may end just now
    done = completed(study)
    ours = max((t for t in done if t.params == defaults), key=lambda t: t.values[0], default=None)
    return cut_off | {trial.number for trial in unbeaten(done, study.directions)} | ({ours.number} if ours else set())


def unbeaten(done: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """Those of the completed trials that no other is at least as good as in all values and better than in one.

    `study.best_trials` are the same, but it copies all trials: after each trial that would take longer with every one.
    """
    signs = [1 if direction == StudyDirection.MAXIMIZE else -1 for direction in directions]
    values = np.array([trial.values for trial in done]).reshape(-1, len(signs)) * signs
    beaten = [((values >= own).all(1) & (values > own).any(1)).any() for own in values]
    return [trial for trial, is_beaten in zip(done, beaten, strict=True) if not is_beaten]


def take_up(trial: optuna.Trial, state: Path, *, track: Callable[[dict[str, list[float]]], None]) -> int:
    """Tells tracker and pruner of the epochs that a trial brings along from the one that was cut off in its place.

    Returns:
        How many there are.

    Args:
        trial: that goes on.
        state: from where, see `TrialFiles.begin`.
        track: is given the series of these epochs, see `History.series`.

    Raises:
        optuna.TrialPruned: it is to stop; the one that was cut off would have been as well.
    """
    history = History()
    history.load_state_dict(read_checkpoint(state)["callbacks"][history.state_key])
    track(history.series())
    trial.set_user_attr("seconds_before", history.seconds_before)
    for epoch in history.epochs if len(trial.study.directions) == 1 else ():  # several values cannot be pruned on
        trial.report(epoch["val_macro_f1"], step=int(epoch["epoch"]) - 1)
        if trial.should_prune():
            raise optuna.TrialPruned(f"Trial was pruned at epoch {int(epoch['epoch']) - 1}.")
    return len(history.epochs)


# ------------------------------------------------------------------------------------------------ what came of it


def search_record(
    study: optuna.Study,
    files: TrialFiles,
    *,
    objectives: Sequence[str],
    defaults: Mapping[str, Any],
    validation: Validation,
    workers: int,
    say: Callable[[str], None],
) -> SearchRecord:
    """What a search did and found.

    Raises:
        SearchFailedError: not one trial came to its end.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if "surplus" not in trial.user_attrs]
    if not completed(study):
        reasons = {t.user_attrs["reason"] for t in trials if "reason" in t.user_attrs}
        raise SearchFailedError(
            f"{study.study_name.rpartition('/')[2]}: none of {len(trials)} trials came to its end"
            f"{'. Reasons: ' + '; '.join(sorted(reasons)) if reasons else ''}. Give the search more time or epochs."
        )
    best, why = to_go_on_with(study, defaults, validation)
    here = files.fetch(best)
    if not here:
        say(
            f"  what trial {best.number}, the best, left is not here: its parameters are trained anew. Give all "
            "processes that share this study a folder for it (artifacts=...)."
        )
    return SearchRecord(
        study=study.study_name,
        sampler=type(study.sampler).__name__,
        proposed_by=dict(Counter(t.user_attrs["proposed_by"] for t in trials if "proposed_by" in t.user_attrs)),
        pruner=type(study.pruner).__name__ if len(objectives) == 1 else None,
        pruned=sum(trial.state == TrialState.PRUNED for trial in trials),
        workers=workers,
        objectives=list(objectives),
        seconds=study_seconds(study),
        best=_best_trial(best, here),
        why=why,
        pareto_front=[{"number": t.number, "values": t.values, "parameters": t.params} for t in study.best_trials],
        trials=[trial_record(trial) for trial in trials],
    )


def _best_trial(trial: FrozenTrial, here: bool) -> BestTrial:
    record = trial.user_attrs.get("record")
    return BestTrial(
        number=trial.number,
        values=trial.values,
        macro_f1=trial.user_attrs["macro_f1"],
        best_epoch=None if record is None else record["best_epoch"],
        parameters=trial.params,
        goes_on=here and record is not None,
        record=None if record is None else TrainingRecord.from_json(record),
    )


def trial_record(trial: FrozenTrial) -> TrialRecord:
    """What the summary keeps of a trial; a pruned one has its last reported value."""
    reported = trial.intermediate_values
    return TrialRecord(
        number=trial.number,
        state=trial.state.name.lower(),
        values=trial.values if trial.state == TrialState.COMPLETE else None,
        last_macro_f1=reported[max(reported)] if reported else None,
        epochs=len(reported),
        parameters=trial.params,
        seconds=trial_seconds(trial),
        **{key: trial.user_attrs[key] for key in ("reason", "again", "proposed_by") if key in trial.user_attrs},
    )

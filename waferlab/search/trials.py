"""Trials: which count, what is kept of them, where their weights are, and which of them is worth going on from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial, TrialState

from waferlab.errors import SearchFailedError
from waferlab.records import BestTrial, SearchRecord, TrainedModel, TrainingRecord, TrialRecord

SEARCH_MUST_GAIN = 0.01  # validation macro F1; so much lies between two trainings that differ in their seed alone


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to their end."""
    return study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that came to an end of their own: those that were cut off run again and are not counted."""
    trials = study.get_trials(deepcopy=False)
    run_again = {t.user_attrs.get("again") for t in trials}
    return [t for t in trials if t.state.is_finished() and t.number not in run_again]


def study_seconds(study: optuna.Study) -> float:
    """Seconds that finished trials took, over all sittings and processes."""
    done = [t.duration for t in counted_trials(study) if t.duration is not None]
    return sum(duration.total_seconds() for duration in done)


def trial_line(study: optuna.Study, trial: FrozenTrial, *, wanted: int, seconds_left: float) -> str:
    """One line for the terminal: number, state, value, best so far, parameters, time left (at most `seconds_left`)."""
    done = counted_trials(study)
    best = max((t.values[0] for t in completed(study)), default=None)
    last = trial.values[0] if trial.values else None
    value = "  -  " if last is None else f"{last:.3f}"
    left = max(0.0, min(max(0, wanted - len(done)) * study_seconds(study) / max(1, len(done)), seconds_left))
    shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    return (
        f"  trial {len(done)}/{wanted}  {trial.state.name.lower():8}  {value}  "
        f"best {'  -  ' if best is None else f'{best:.3f}'}  {shown}  about {left:.0f} s left"
        + (f"  ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else "")
    )


# ------------------------------------------------------------------------------------------------- their weights


class TrialWeights:
    """The checkpoints of a model's trials, and the folder through which processes that share a study exchange them.

    Args:
        folder: where this process keeps them, as <number>.ckpt.
        shared: folder that all can reach; None if the study is not shared.
    """

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        self.folder, self._store = folder, None
        if shared is not None:
            shared.mkdir(parents=True, exist_ok=True)
            self._store = FileSystemArtifactStore(shared)

    def file(self, number: int) -> Path:
        """Where the weights of a trial are, or will be."""
        return self.folder / f"{number}.ckpt"

    def share(self, trial: optuna.Trial) -> None:
        """Leaves a trial's weights where the others can fetch them."""
        file = self.file(trial.number)
        if self._store is not None and file.exists():
            shared = upload_artifact(artifact_store=self._store, file_path=str(file), study_or_trial=trial)
            trial.set_user_attr("artifact", shared)

    def fetch(self, trial: FrozenTrial) -> Path | None:
        """The weights of a trial, if they are here or another process has left them where we can fetch them."""
        file = self.file(trial.number)
        if not file.exists() and self._store is not None and "artifact" in trial.user_attrs:
            file.parent.mkdir(parents=True, exist_ok=True)
            artifact = {"artifact_id": trial.user_attrs["artifact"], "file_path": str(file)}
            with suppress(ArtifactNotFound):
                download_artifact(artifact_store=self._store, **artifact)
        return file if file.exists() else None

    def forget_beaten(self, study: optuna.Study) -> None:
        """Deletes the weights of trials that can no longer win."""
        trials = study.get_trials(deepcopy=False)
        done = any(trial.state == TrialState.COMPLETE for trial in trials)
        keep = {trial.number for trial in study.best_trials} if done else set()
        keep |= {trial.number for trial in trials if trial.state == TrialState.RUNNING}
        for file in self.folder.glob("*.ckpt"):
            if not file.stem.isdigit() or int(file.stem) not in keep:
                file.unlink(missing_ok=True)
        for trial in trials:
            if self._store is not None and trial.number not in keep and "artifact" in trial.user_attrs:
                with suppress(ArtifactNotFound):  # another process may have been first
                    self._store.remove(trial.user_attrs["artifact"])


# ------------------------------------------------------------------------------------------------ what came of it


def search_record(
    study: optuna.Study, weights: TrialWeights, *, objectives: Sequence[str], say: Callable[[str], None]
) -> SearchRecord:
    """What a search did and found.

    Raises:
        SearchFailedError: not one trial came to its end.
    """
    trials = study.get_trials(deepcopy=False)
    if not completed(study):
        reasons = {t.user_attrs["reason"] for t in trials if "reason" in t.user_attrs}
        raise SearchFailedError(
            f"{study.study_name.rpartition('/')[2]}: none of {len(trials)} trials came to its end"
            f"{'. Reasons: ' + '; '.join(sorted(reasons)) if reasons else ''}. Give the search more time or epochs."
        )
    front = study.best_trials
    best = max(front, key=lambda trial: trial.values[0])
    checkpoint = weights.fetch(best)
    if checkpoint is None:
        say(
            f"  the weights of trial {best.number}, the best, are not here: its parameters are trained anew. Give "
            "all processes that share this study a folder for them (artifacts=...)."
        )
    return SearchRecord(
        study=study.study_name,
        sampler=type(study.sampler).__name__,
        proposed_by=dict(Counter(t.user_attrs["proposed_by"] for t in trials if "proposed_by" in t.user_attrs)),
        pruner=type(study.pruner).__name__ if len(objectives) == 1 else None,
        objectives=list(objectives),
        seconds=study_seconds(study),
        best=_best_trial(best, checkpoint),
        pareto_front=[{"number": t.number, "values": t.values, "parameters": t.params} for t in front],
        trials=[trial_record(trial) for trial in trials],
    )


def _best_trial(trial: FrozenTrial, checkpoint: Path | None) -> BestTrial:
    record = trial.user_attrs.get("record")
    return BestTrial(
        number=trial.number,
        values=trial.values,
        macro_f1=trial.user_attrs["macro_f1"],
        best_epoch=None if record is None else record["best_epoch"],
        parameters=trial.params,
        checkpoint=None if checkpoint is None else f"trials/{checkpoint.name}",
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
        seconds=trial.duration.total_seconds() if trial.duration else None,
        **{key: trial.user_attrs[key] for key in ("reason", "again", "proposed_by") if key in trial.user_attrs},
    )


def worth_training(search: SearchRecord, defaults: Mapping[str, Any], *, say: Callable[[str], None]) -> dict[str, Any]:
    """The best parameters, unless the default ones are as good within the noise: those served many trainings."""
    best = search.best
    for trial in search.trials:
        if trial.parameters == defaults != best.parameters and trial.state == "complete":
            lead = best.values[0] - trial.values[0]
            if lead < SEARCH_MUST_GAIN:
                say(f"  trial {best.number} leads the defaults by {lead:.4f} only: the defaults are trained")
                return dict(defaults)
    return best.parameters


def better_of(record: TrainingRecord, search: SearchRecord, *, say: Callable[[str], None]) -> TrainedModel:
    """The record of the final training, or of the best trial where its own weights are better on validation.

    Parameters, epochs and history are those of the weights that stay; what was beaten is kept beside them.
    """
    best, more = search.best, {"total_seconds": search.seconds + record.train_seconds}
    more["search"] = replace(search, best=replace(best, record=None))
    if best.checkpoint is None or best.macro_f1 <= record.val_macro_f1:
        return TrainedModel(**vars(record), **more)
    say(f"  trial {best.number} stays: {best.macro_f1:.3f} on validation, final training {record.val_macro_f1:.3f}")
    beaten = ("parameters", "epochs", "best_epoch", "train_seconds", "history")
    more["final_training"] = {name: getattr(record, name) for name in beaten}
    return TrainedModel(**vars(best.record), weights_from=f"trial {best.number}", **more)

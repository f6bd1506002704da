"""What trials leave on disk, and the folder through which processes that share a study exchange it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from waferlab.errors import DamagedFileError
from waferlab.training.checkpoints import checkpoint_digest


def repeated_by(trial: BaseTrial, trials: Sequence[FrozenTrial]) -> Iterator[int]:
    """The numbers of the trials that were cut off and that this one is to finish, the last of them first."""
    while (number := trial.user_attrs.get("again")) is not None:
        yield number
        trial = trials[number]


class TrialFiles:
    """Two checkpoints a trial: the weights of its best epoch, and the state after its last, to go on from.

    Args:
        folder: where this process keeps them.
        shared: folder that all can reach; None if the study is not shared.
    """

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        self.folder, self._store = folder, None
        if shared is not None:
            shared.mkdir(parents=True, exist_ok=True)
            self._store = FileSystemArtifactStore(shared)

    def best(self, number: int) -> Path:
        """Where the weights of a trial's best epoch are, or will be."""
        return self.folder / f"{number}.ckpt"

    def state(self, number: int) -> Path:
        """Where the state after a trial's last epoch is, or will be."""
        return self.folder / f"{number}.state.ckpt"

    def begin(self, trial: optuna.Trial) -> Path | None:
        """The state that a trial goes on from: after the last whole epoch of the one that was cut off in its place.

        It is a copy, as is that of the best weights: whoever was taken for dead may come back and write to the others.
        None if nothing was cut off, or not even an epoch of it is here, whole.
        """
        ours = (self.best(trial.number), self.state(trial.number))
        for file in ours:
            file.unlink(missing_ok=True)
        for number in repeated_by(trial, trial.study.get_trials(deepcopy=False)):
            theirs = (self.best(number), self.state(number))
            with suppress(DamagedFileError):  # of which a missing one is a kind
                for file in theirs:
                    checkpoint_digest(file)
                for file, place in zip(theirs, ours, strict=True):
                    unfinished = place.with_name(f"{place.name}.unfinished")
                    unfinished.unlink(missing_ok=True)  # a link of that name would lead elsewhere
                    shutil.copyfile(file, unfinished)
                    os.replace(unfinished, place)
                return ours[1]
        return None

    def share(self, trial: optuna.Trial) -> None:
        """Leaves a trial's files where the others can fetch them."""
        files = [file for file in (self.best(trial.number), self.state(trial.number)) if file.exists()]
        if self._store is not None:
            shared = {
                file.name: upload_artifact(artifact_store=self._store, file_path=str(file), study_or_trial=trial)
                for file in files
            }
            trial.set_user_attr("files", shared)

    def fetch(self, trial: FrozenTrial) -> bool:
        """Whether both files are here, or another process has left them where they could be fetched just now."""
        files = (self.best(trial.number), self.state(trial.number))
        for file in files:
            shared = trial.user_attrs.get("files", {}).get(file.name)
            if not file.exists() and self._store is not None and shared is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                half = file.with_name(f"{file.name}.unfinished")
                half.unlink(missing_ok=True)
                with suppress(ArtifactNotFound):
                    download_artifact(artifact_store=self._store, artifact_id=shared, file_path=str(half))
                    os.replace(half, file)
        return all(file.exists() for file in files)

    def forget_all_but(self, keep: Collection[int], study: optuna.Study) -> None:
        """Deletes the files of trials that no training will go on from; of those that still run none is deleted."""
        trials = study.get_trials(deepcopy=False)
        keep = {*keep, *(trial.number for trial in trials if trial.state == TrialState.RUNNING)}
        for file in self.folder.glob("*.ckpt*"):  # of those that were killed also what they had begun to write
            number = file.name.partition(".")[0]
            if not number.isdigit() or int(number) not in keep:
                file.unlink(missing_ok=True)
        for trial in trials:
            if self._store is not None and trial.number not in keep:
                for shared in trial.user_attrs.get("files", {}).values():
                    with suppress(ArtifactNotFound):  # another process may have been first
                        self._store.remove(shared)

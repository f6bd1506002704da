"""What a training leaves on disk: whole files that can be told from damaged ones, marks to go on from, a lock.

A checkpoint is a ZIP archive, and an archive may end with a comment. Ours is the SHA-256 of all that stands before it:
so one file carries its own check sum, is replaced in one step, and opens in `torch.load` as ever.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from waferlab.data.datamodule import WaferMapDataModule
from waferlab.errors import ConfigError, DamagedFileError, FolderInUseError
from waferlab.models.classifier import WaferClassifier
from waferlab.records import StartingWeights, TrainingRecord, write_summary
from waferlab.tracking.addresses import command_line_used
from waferlab.tracking.processes import still_runs, this_process
from waferlab.tracking.whole_files import sweep_up, write_atomically
from waferlab.training.callbacks import History

SEAL = b"sha256:"
SEAL_LENGTH = len(SEAL) + 64
LET_GO = 10.0  # seconds in which the workers of a program that was killed notice it and let go of its folders


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint straight to a file beside its place, seals it and moves it there: whole or not at all.

    Lightning's own way first builds the file in memory and copies it twice, which took eight times as long for the
    137 MB of a ResNet18: more than a second an epoch.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Replaces the file of that name, if there is one.

        Raises:
            OSError: it cannot be written; what was there before is unharmed.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        with_sums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # `torch.load` never looks at them, and they take a second
        try:
            unfinished.unlink(missing_ok=True)  # a link of that name would lead elsewhere
            torch.save(checkpoint, unfinished)
            _seal(unfinished)
            os.replace(unfinished, path)
        except RuntimeError as error:
            if "inline_container.cc" in str(error):  # PyTorch's writer of archives, which does not tell why
                raise _why_not(unfinished) from error
            raise
        finally:
            torch.serialization.set_crc32_options(with_sums)
            unfinished.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """See `read_checkpoint`."""
        return read_checkpoint(Path(path))


def _why_not(file: Path) -> OSError:
    """Why a file cannot grow, as the system says when it is asked again."""
    try:
        with file.open("ab") as again:
            again.write(bytes(2**20))
    except OSError as error:
        return OSError(error.errno, error.strerror, str(file))
    return OSError(errno.EIO, "a checkpoint could not be written", str(file))


def _seal(file: Path) -> None:
    """Appends the check sum of an archive as its comment; the last two bytes of an archive are the comment's length."""
    with file.open("r+b") as archive:
        digest = hashlib.file_digest(archive, "sha256").hexdigest()
        archive.seek(-2, os.SEEK_END)
        archive.write(SEAL_LENGTH.to_bytes(2, "little") + SEAL + digest.encode())


def checkpoint_digest(file: Path, *, expected: str | None = None) -> str:
    """The SHA-256 that a checkpoint carries, once it is found to be that of its content.

    Args:
        file: written by `CheckpointFiles`.
        expected: the check sum that it must have, as its training noted it.

    Raises:
        DamagedFileError: the file is missing, cut short, has changed since it was written, or is another training's.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"{file} cannot be read ({error.strerror}). {_remedy(file)}") from error
    end = len(content) - SEAL_LENGTH
    seal, written = content[end : end + len(SEAL)], content[end + len(SEAL) :].decode("ascii", "replace")
    digest = hashlib.sha256(memoryview(content)[: max(0, end - 2)])
    digest.update(b"\0\0")  # the length of the comment before there was one
    if seal != SEAL or digest.hexdigest() != written:
        raise DamagedFileError(f"{file} is damaged: it is not what the training wrote. {_remedy(file)}")
    if expected not in (None, written):
        raise DamagedFileError(
            f"{file} is whole but not the one that this training wrote: another run has replaced it. {_remedy(file)}"
        )
    return written


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Reads a checkpoint on the CPU without running code from it.

    Raises:
        DamagedFileError: it is damaged, or holds anything else than tensors and plain values.
    """
    checkpoint_digest(file)
    with _or_damaged(file):
        return torch.load(file, map_location="cpu", weights_only=True)


def load_trained(model_class: type[WaferClassifier], file: Path, *, expected: str) -> WaferClassifier:
    """The model of a checkpoint, on the CPU, in evaluation mode; Lightning rebuilds it without running code from it.

    Args:
        model_class: of the model.
        file: written by `CheckpointFiles`.
        expected: the check sum that it must have, as its training noted it.

    Raises:
        DamagedFileError: it is damaged, another training's, or not of this class.
    """
    checkpoint_digest(file, expected=expected)
    with _or_damaged(file):
        return model_class.load_from_checkpoint(file, map_location="cpu", weights_only=True).eval()


@contextmanager
def _or_damaged(file: Path) -> Iterator[None]:
    """Its check sum is right, so whoever made it put something else into it than a training does."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(f"{file} cannot be loaded safely ({reason}). {_remedy(file)}") from error


def _remedy(file: Path) -> str:
    if file.parent.name == "trials":
        return "Delete it; with --resume the weights of the final training are taken."
    return "Delete it; with --resume this model is trained again, and all others are kept."


def read_json(file: Path) -> dict[str, Any]:
    """A record that an earlier run wrote.

    Raises:
        DamagedFileError: it is not JSON, or not a record.
    """
    try:
        record = json.loads(file.read_text())
        if isinstance(record, dict):
            return {key: value for key, value in record.items() if key != "schema_version"}
    except (ValueError, OSError) as error:
        raise DamagedFileError(f"{file} is damaged ({error}). {_remedy(file)}") from error
    raise DamagedFileError(f"{file} is damaged (no record in it). {_remedy(file)}")


class TrainingFolder:
    """The folder of one model's final training: its checkpoints, how it started, and its record once it is finished.

    Args:
        folder: where they are.
        fingerprint: of settings and data; what was made with another one is refused.
        parameters: that the training was asked for, as by a search; with others than before, it begins anew.
    """

    def __init__(self, folder: Path, fingerprint: str, parameters: dict[str, Any] | None = None) -> None:
        self.folder, self.asked = folder, {"fingerprint": fingerprint, "asked_for": parameters or {}}
        self.best, self.resume = folder / "best.ckpt", folder / "resume.ckpt"
        self._finished, self._started = folder / "finished.json", folder / "started.json"

    def finished(self) -> TrainingRecord | None:
        """The record of a training that came to its end and left its best weights, or None."""
        if not (self._finished.exists() and self.best.exists()):
            return None
        record = self._read(self._finished)
        with _or_damaged(self._finished):
            return None if record is None else TrainingRecord.from_json(record)

    def resume_point(self) -> Path | None:
        """The checkpoint to go on from, or None if there is none."""
        if not (self._started.exists() and self.resume.exists() and self.best.exists()):
            return None
        return None if self._read(self._started) is None else self.resume

    def begin(self, *, resume: bool, from_trial: tuple[TrainingRecord, Path, Path] | None = None) -> Path | None:
        """The checkpoint to go on from: of this training, if it was cut off, or of a trial; None for one from anew.

        Args:
            resume: whether to look for one of this training.
            from_trial: its record, the weights of its best epoch, its state after the last.

        Raises:
            DamagedFileError: a checkpoint of the trial is damaged.
        """
        if resume and (point := self.resume_point()) is not None:
            return point
        self.start_afresh()
        if from_trial is None:
            return None
        record, *files = from_trial
        for file, place in zip(files, (self.best, self.resume), strict=True):
            checkpoint_digest(file)
            shutil.copyfile(file, place)
        self._remember(record.weights, record.parameters["learning_rate"])
        return self.resume

    def start_afresh(self) -> None:
        """Clears what an earlier training left."""
        for file in (self._finished, self._started, self.resume, self.best):
            file.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def remember_start(self, model: WaferClassifier) -> None:
        """Notes what a training starts from."""
        self._remember(model.starting_weights, model.learning_rate)

    def _remember(self, weights: StartingWeights, learning_rate: float) -> None:
        write_summary(self._started, {**self.asked, "weights": asdict(weights), "learning_rate": learning_rate})

    def restore_start(self, model: WaferClassifier) -> None:
        """Tells a model that goes on from a checkpoint, which cannot know it, what its training started from."""
        started = self._read(self._started) or {}
        with _or_damaged(self._started):
            model.set_learning_rate(float(started["learning_rate"]))
            model.starting_weights = StartingWeights(**started["weights"])

    def finish(self, record: TrainingRecord) -> None:
        """Notes that the training came to its end, with its record."""
        write_summary(self._finished, {**record.as_json(), **self.asked})

    def _read(self, file: Path) -> dict[str, Any] | None:
        record = read_json(file)
        if record.get("fingerprint") != self.asked["fingerprint"]:
            raise ConfigError(
                f"{self.folder} was trained with other settings or data. Repeat the settings of that run, or leave out "
                "--resume to train anew."
            )
        return record if record.get("asked_for") == self.asked["asked_for"] else None


class _Kept(ModelCheckpoint):
    """Lightning's own, but in a training that goes on from another folder, the best score so far is still known."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the scores; the files have been brought along under the names that they have here."""
        here = str(Path(self.dirpath) / f"{self.filename}.ckpt")
        files = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: here for name in files if state.get(name)} | {"dirpath": self.dirpath}
        scores = list(state["best_k_models"].values())
        super().load_state_dict(state | moved | {"best_k_models": {here: scores[0]} if scores else {}})


def best_weights(file: Path) -> ModelCheckpoint:
    """Keeps the weights of the best epoch by validation macro F1 in a file."""
    return _Kept(
        file.parent, filename=file.stem, monitor="val_macro_f1", mode="max", save_weights_only=True,
        enable_version_counter=False,
    )  # fmt: skip


def every_epoch(file: Path) -> ModelCheckpoint:
    """Keeps the state after the last epoch in a file; `save_last` would follow the best epoch rather than the last."""
    return _Kept(file.parent, filename=file.stem, enable_version_counter=False)


@contextmanager
def hold_folders(*folders: Path) -> Iterator[None]:
    """Holds folders for this run alone, after a try whether files can be written there.

    Raises:
        ConfigError: a folder cannot be written.
        FolderInUseError: another run holds one.
    """
    with ExitStack() as held:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                proof = write_atomically(folder / ".writable", bytes(4096))  # a full disk still takes an empty file
                proof.unlink(missing_ok=True)  # a program that began at the same moment may have been quicker
            except OSError as error:
                raise ConfigError(f"{folder} cannot be written ({error}). Choose another output_dir.") from error
            held.enter_context(hold_folder(folder))
            sweep_up(folder)
        yield


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Holds a folder for this run alone, as long as the block lasts; the system lets go of it if the program dies.

    Raises:
        FolderInUseError: another run holds it; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8", errors="backslashreplace", opener=_not_by_a_link) as lock:
        _lock(lock, folder)
        lock.truncate(0)
        command = command_line_used()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"process {os.getpid()} on {platform.node()} since {since} ({command})", file=lock)
        print(this_process(), file=lock, flush=True)
        try:
            yield
        finally:
            lock.truncate(0)


def _lock(lock: IO[str], folder: Path) -> None:
    until = time.monotonic() + LET_GO
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            lock.seek(0)
            said, _, process = lock.read().strip().partition("\n")
        # Of a program that was killed, workers may live on for a moment and hold its folders.
        if time.monotonic() > until or not process or still_runs(process):
            raise FolderInUseError(
                f"{folder} is in use by {said or 'another run'}. Wait until it has ended, stop it, or give this run "
                "another --output-dir or experiment_name."
            )
        time.sleep(0.05)


def _not_by_a_link(path: str, flags: int) -> int:
    """For `open`: a link that somebody else has put there would have another file emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def record_training(
    model_type: str,
    model: WaferClassifier,
    data: WaferMapDataModule,
    history: History,
    *,
    precision: str | int,
    checkpoint: Path,
) -> TrainingRecord:
    """The record of a training that has just ended; its checkpoint lies in the model's folder, or one below."""
    best = max(history.epochs, key=lambda epoch: epoch["val_macro_f1"])
    parameters = {name: list(v) if isinstance(v, tuple) else v for name, v in dict(model.hparams).items()}
    folder = next(parent for parent in checkpoint.parents if parent.name == model_type)
    return TrainingRecord(
        model_type=model_type,
        parameters={"batch_size": data.batch_size} | parameters,
        weights=model.starting_weights,
        precision=str(precision),
        n_parameters=sum(p.numel() for p in model.network.parameters()),
        epochs=len(history.epochs),
        best_epoch=int(best["epoch"]),
        train_seconds=history.seconds(),
        history=history.series(),
        checkpoint=str(checkpoint.relative_to(folder)),
        checkpoint_sha256=checkpoint_digest(checkpoint),
    )

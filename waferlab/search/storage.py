"""Where a study is kept: in a journal file beside the results, or in a database that others share."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from waferlab.errors import DamagedFileError


def study_storage(url: str | None, *, journal: Path, heartbeat: int) -> BaseStorage:
    """A database, or without a URL the journal file; `heartbeat` is of the database, see `open_database`."""
    if url is not None:
        from waferlab.search.database import open_database

        return open_database(url, heartbeat=heartbeat)
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.touch()
    lock = SystemsLock(journal)
    lock.acquire()  # a worker that is about to write has its line whole
    try:
        mend_journal(journal)
    finally:
        lock.release()
    return JournalStorage(WholeLines(journal, lock))


class SystemsLock:
    """Of a file, for one process at a time; the system lets go of it when the process dies.

    Optuna's own locks are files, which a program that is killed leaves behind, to be taken away by their age.
    """

    def __init__(self, file: Path) -> None:
        self._path: Path = file
        self._held: IO[bytes] | None = None

    def acquire(self) -> None:
        """Waits until nobody else holds it."""
        self.release()  # in case that Ctrl-C came before it was given back
        opened = self._path.open("ab")  # some network drives lock only what may be written
        fcntl.flock(opened, fcntl.LOCK_EX)
        self._held = opened

    def release(self) -> None:
        """Lets go of it, if it is held."""
        if self._held is not None:
            self._held.close()


class WholeLines(JournalFileBackend):
    """Optuna's journal, but of lines that cannot be written, as on a full disk, not even a part is left.

    Another process would write behind that part, when there is room again, and nobody could read on from there.
    """

    def __init__(self, journal: Path, lock: SystemsLock) -> None:
        super().__init__(str(journal))
        self._journal, self._ours = journal, lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes a line for each, all of them or none."""
        left = memoryview("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode())
        self._ours.acquire()
        try:
            with self._journal.open("r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(end)
                    raise
        finally:
            self._ours.release()


def mend_journal(journal: Path) -> None:
    """Cuts off a last line that a crash left unfinished: the next one would be written behind it, and lost with it.

    Raises:
        DamagedFileError: a line before the last is no longer what was written.
    """
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line.decode())
        except ValueError as error:
            raise DamagedFileError(
                f"Line {number} of {journal} is damaged ({error}). Move the file away; with --resume all searches are "
                "done anew, and of the models that are finished those stay for which the same is found."
            ) from error
    if rest:
        with journal.open("r+b") as file:
            file.truncate(len(content) - len(rest))

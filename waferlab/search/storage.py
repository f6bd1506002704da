"""Where a study is kept: in a journal file beside the results, or in a database that others share."""

from __future__ import annotations

import json
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from waferlab.errors import DamagedFileError

LET_GO = 5  # seconds after which a journal's lock is taken from whoever holds it; a line is written in milliseconds


def study_storage(url: str | None, *, journal: Path, heartbeat: int) -> BaseStorage:
    """A database, or without a URL the journal file; `heartbeat` is of the database, see `open_database`."""
    if url is not None:
        from waferlab.search.database import open_database

        return open_database(url, heartbeat=heartbeat)
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.touch()
    # Optuna's lock is a link to the file. To take it from a program that was killed, it asks how old that is; and of a
    # link that leads nowhere, as with a relative path or in a folder that was moved, it asks for ever.
    path, link = str(journal.resolve()), journal.with_name(f"{journal.name}.lock")
    if link.is_symlink() and not link.exists():
        link.unlink(missing_ok=True)
    lock = JournalFileSymlinkLock(path, grace_period=LET_GO)
    lock.acquire()  # a worker that is about to write has its line whole
    try:
        mend_journal(journal)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(path, lock_obj=lock))


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
                f"Line {number} of {journal} is damaged ({error}). Move the file away; with --resume the models that "
                "are finished are kept, and the others are searched for anew."
            ) from error
    if rest:
        with journal.open("r+b") as file:
            file.truncate(len(content) - len(rest))

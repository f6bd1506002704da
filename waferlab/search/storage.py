"""Where a study is kept: in a journal file beside the results, or in a database that others share."""

from __future__ import annotations

import json
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from waferlab.errors import DamagedFileError


def study_storage(url: str | None, *, journal: Path, heartbeat: int) -> BaseStorage:
    """A database, or without a URL the journal file; `heartbeat` is of the database, see `open_database`."""
    if url is not None:
        from waferlab.search.database import open_database

        return open_database(url, heartbeat=heartbeat)
    journal.parent.mkdir(parents=True, exist_ok=True)
    mend_journal(journal)
    return JournalStorage(JournalFileBackend(str(journal)))


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

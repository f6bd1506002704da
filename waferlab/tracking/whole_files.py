"""Files that are whole or not there, whenever a program is killed."""

from __future__ import annotations

import os
from pathlib import Path

from waferlab.tracking.processes import is_gone


def sweep_up(folder: Path, names: str = "**/.*.tmp") -> None:
    """Takes away what programs that are gone had begun to write in a folder and below; see `write_atomically`."""
    for file in folder.glob(names):
        number = file.name.split(".")[-2]
        if number.isdecimal() and is_gone(int(number)):
            file.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes, *, replace: bool = True) -> Path:
    """Writes the file in one step, so that a crash leaves the old content, never half of the new one.

    Raises:
        FileExistsError: the file is there, and is not to be replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace cannot cross disks
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # made here: a link that somebody has put there is not followed
            file.write(data)
        (os.replace if replace else os.link)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path

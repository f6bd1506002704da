"""Files that are whole or not there, whenever a program is killed."""

from __future__ import annotations

import os
from pathlib import Path

from waferlab.tracking.processes import is_gone, where_numbers_hold


def temporary(path: Path) -> Path:
    """Where this process writes a file before it is whole: in its folder, as none can be moved to another disk."""
    return path.with_name(f".{path.name}.{where_numbers_hold()}-{os.getpid()}.tmp")


def sweep_up(folder: Path, names: str = "**/.*.tmp") -> None:
    """Takes away what programs of this machine that are gone had begun to write in a folder and below."""
    for file in folder.glob(names):
        where, _, number = file.name.split(".")[-2].rpartition("-")
        if where == where_numbers_hold() and number.isdecimal() and is_gone(int(number)):
            file.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes, *, replace: bool = True) -> Path:
    """Writes the file in one step, so that a crash leaves the old content, never half of the new one.

    Raises:
        FileExistsError: the file is there, and is not to be replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = temporary(path)
    half.unlink(missing_ok=True)
    try:
        with half.open("xb") as file:  # made here: a link that somebody has put there is not followed
            file.write(data)
        (os.replace if replace else os.link)(half, path)
    finally:
        half.unlink(missing_ok=True)
    return path

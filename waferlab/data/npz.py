"""Reads .npz files of unknown origin within bounds: without pickles, and without more memory than they may claim.

An .npz is a zip of .npy files. Both say how large they are, and both can lie: a file of a kilobyte can declare an array
of a petabyte, and one of two megabytes can inflate to two gigabytes. So sizes are compared and added up before any
array is made.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# A million maps of 26x26 dies, nine in ten of them without a failing die, inflate to 63 times their file; real maps of
# WM-811K to 10 times. What deflate can do at most is about 1,030 times.
LARGEST_RATIO = 200
ALWAYS_ALLOWED = 256 * 2**20  # bytes; a few large maps may well be nearly empty


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads those of the arrays `names` that the file has; others in it are not touched.

    Raises:
        ValueError: the file is damaged or no .npz, an array holds Python objects, or its sizes are not to be believed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name for name in names if f"{name}.npy" in archive.namelist()]
            _check_sizes(archive, held, file_size=path.stat().st_size)
            return {name: _read_array(archive, name) for name in held}
    except _TooLargeError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds on a damaged or pickled file
        raise ValueError(f"{path}: cannot be read as an .npz without pickles. Save it with numpy.savez.") from error


def names_in_npz(path: Path) -> list[str]:
    """The names of all arrays in an .npz, in order."""
    with zipfile.ZipFile(path) as archive:
        return sorted(name.removesuffix(".npy") for name in archive.namelist())


class _TooLargeError(Exception):
    """The sizes that the file declares do not fit each other, or the file."""


def _check_sizes(archive: zipfile.ZipFile, names: Sequence[str], *, file_size: int) -> None:
    """Refuses arrays that are larger than their member of the zip, and members that are far larger than the file.

    What the zip declares is a bound that holds: `zipfile` stops inflating a member there.
    """
    for name in names:
        with archive.open(f"{name}.npy") as member:
            declared = _bytes_declared(member)
        inflated = archive.getinfo(f"{name}.npy").file_size
        if declared != inflated:
            raise _TooLargeError(
                f"array {name!r} declares {declared:,} bytes, but the file holds {inflated:,} of it. The file is cut "
                "off or made up: save the maps anew with numpy.savez."
            )
    total = sum(archive.getinfo(f"{name}.npy").file_size for name in names)
    allowed = max(ALWAYS_ALLOWED, LARGEST_RATIO * file_size)
    if total > allowed:
        raise _TooLargeError(
            f"{file_size:,} bytes that inflate to {total:,}; at most {allowed:,} are read, {LARGEST_RATIO} times the "
            "file. If the maps are real, save them with numpy.savez instead of savez_compressed."
        )


def _bytes_declared(member: zipfile.ZipExtFile) -> int:
    """The size of a .npy, header included, as its header declares it."""
    if np.lib.format.read_magic(member) != (1, 0):  # later versions are for records, and allow headers of gigabytes
        raise ValueError("not an array of numbers or texts")
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"an array of {dtype}")
    return member.tell() + math.prod(shape) * dtype.itemsize


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)

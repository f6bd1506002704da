"""Reads .npz files of unknown origin within bounds: without pickles, and without more memory than they may claim.

A whole array at a time, or a few of its items at a time where an array may be larger than the memory.

An .npz is a zip of .npy files. Both say how large they are, and both can lie: a file of a kilobyte can declare an array
of a petabyte, and one of two megabytes can inflate to two gigabytes. So sizes are compared and added up before any
array is made.
"""

from __future__ import annotations

import contextlib
import math
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# A million maps of 26x26 dies, nine in ten of them without a failing die, inflate to 63 times their file; real maps of
# WM-811K to 10 times. What deflate can do at most is about 1,030 times.
LARGEST_RATIO = 200
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others `zipfile` inflates a block as a whole
ALWAYS_ALLOWED = 256 * 2**20  # bytes; a few large maps may well be nearly empty


@dataclass(frozen=True)
class Header:
    """What an array says of itself; `by_columns` if its items lie one column after the other, as in Fortran."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads those of the arrays `names` that the file has; others in it are not touched.

    Raises:
        ValueError: the file is damaged or no .npz, an array holds Python objects, or its sizes are not to be believed.
    """
    with _opened(path, names) as (archive, held), _damage_named(path):
        return {name: _read_array(archive, name) for name in held}


def read_headers(path: Path, names: Sequence[str]) -> dict[str, Header]:
    """What those of the arrays `names` that the file has say of themselves; their sizes together are checked.

    Raises:
        ValueError: as `read_npz`.
    """
    with _opened(path, names) as (_, held):
        return held


class ArrayStream:
    """An array of an .npz of which the next items along its first axis are read, and no more.

    Attributes:
        shape, dtype: of the whole array.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str, header: Header) -> None:
        self.shape, self.dtype = header.shape, header.dtype
        self._path, self._left = path, header.shape[0]
        self._of_one = math.prod(header.shape[1:]) * header.dtype.itemsize
        # Its first item is spread over the whole file, so it has to be there as a whole.
        self._whole = _read_array(archive, name) if header.by_columns else None
        self._member = archive.open(f"{name}.npy")
        _header(self._member)

    def read(self, number: int) -> np.ndarray:
        """The next items, [number, ...], not to be written to; `number` is at most what is left.

        Raises:
            ValueError: the file is damaged here.
        """
        start, self._left = self.shape[0] - self._left, self._left - number
        if self._whole is not None:
            return self._whole[start : start + number]
        with _damage_named(self._path):  # the check sum is compared at the array's end, by zipfile
            data = self._member.read(number * self._of_one)
            return np.frombuffer(data, self.dtype).reshape(number, *self.shape[1:])


@contextlib.contextmanager
def stream_array(path: Path, name: str) -> Iterator[ArrayStream]:
    """Opens one array of the file to be read from its first item to its last.

    Raises:
        ValueError: as `read_npz`.
    """
    with _opened(path, [name]) as (archive, held):
        with _damage_named(path):
            array = ArrayStream(path, archive, name, held[name])
        yield array


@contextlib.contextmanager
def _opened(path: Path, names: Sequence[str]) -> Iterator[tuple[zipfile.ZipFile, dict[str, Header]]]:
    """The file, and the headers of those arrays that it has, whose sizes have been checked."""
    with contextlib.ExitStack() as stack:
        with _damage_named(path):
            if not path.is_file():  # a pipe or a device never ends
                raise ValueError("no plain file")
            archive = stack.enter_context(zipfile.ZipFile(path))
            held = [name for name in names if f"{name}.npy" in archive.namelist()]
            if any(archive.getinfo(f"{name}.npy").compress_type not in BOUNDED for name in held):
                raise ValueError("compressed as numpy never does")
            headers = _check_sizes(archive, held, file_size=path.stat().st_size)
        yield archive, headers


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _TooLargeError as error:
        raise ValueError(f"{path}: {error}") from error
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds on a damaged or pickled file
        raise ValueError(f"{path}: cannot be read as an .npz without pickles. Save it with numpy.savez.") from error


def names_in_npz(path: Path) -> list[str]:
    """The names of all arrays in an .npz, in order."""
    with zipfile.ZipFile(path) as archive:
        return sorted(name.removesuffix(".npy") for name in archive.namelist())


class _TooLargeError(Exception):
    """The sizes that the file declares do not fit each other, or the file."""


def _check_sizes(archive: zipfile.ZipFile, names: Sequence[str], *, file_size: int) -> dict[str, Header]:
    """Refuses arrays that are larger than their member of the zip, and members that are far larger than the file.

    What the zip declares is a bound that holds: `zipfile` stops inflating a member there.
    """
    headers = {}
    for name in names:
        with archive.open(f"{name}.npy") as member:
            headers[name] = header = _header(member)
            declared = member.tell() + math.prod(header.shape) * header.dtype.itemsize
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
    return headers


def _header(member: zipfile.ZipExtFile) -> Header:
    """What a .npy declares; the member is then at its first item."""
    if np.lib.format.read_magic(member) != (1, 0):  # later versions are for records, and allow headers of gigabytes
        raise ValueError("not an array of numbers or texts")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(member)
    endless = math.prod(filter(None, shape)) > sys.maxsize // 16  # numpy converts none such, be it empty
    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0 or endless:
        raise ValueError(f"an array of {dtype} {shape}")
    return Header(shape, dtype, by_columns and len(shape) > 1)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    if array.dtype.kind == "U" and np.atleast_1d(array).view(f"{array.dtype.str[0]}u4").max(initial=0) > sys.maxunicode:
        raise ValueError("letters that Unicode does not know")
    return array

"""Reads WM-811K's `LSWMD.pkl`, whose content is not trusted, and converts it once into an .npz beside it.

`lswmd_pickle.py` takes the file apart without running anything that is in it; here each cell is checked, and what
holds becomes the arrays of our own layout.
"""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from waferlab.data.lswmd_pickle import REWRITE, Array, Missing, load_columns, malformed, short
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.npz import read_npz

LARGEST_DIE_VALUE = 2  # 0 no die, 1 pass, 2 fail
LONGEST_SIDE = np.iinfo(np.int16).max
CACHE_LAYOUT = 1  # raise it when the arrays of the cache change, so that old caches are made again


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of records are made and none is garbage; the collector would walk over all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _text(cell: Any, *, column: str, row: int) -> str | None:
    """The text in a cell, however deep it is nested (`array([['none']])`), or None for an empty one."""
    content = cell
    for _ in range(4):  # a limit, because a pickled list can contain itself
        if isinstance(content, Array):
            content = content.cells()
        if not isinstance(content, list | tuple) or len(content) > 1:
            break
        content = content[0] if content else None
    if content is None or content == "" or content is Missing or content != content:  # NaN is not itself
        return None
    if isinstance(content, bytes):
        content = content.decode("latin1")
    if not isinstance(content, str):
        raise ValueError(f"Row {row}: {column} is {short(content)}, not a text or an array with one text. {REWRITE}")
    return content


def _labels(cells: list[Any]) -> tuple[list[int], list[str]]:
    """The rows that have a label, and the labels.

    Raises:
        ValueError: a label is not one of `CLASS_NAMES`.
    """
    rows, labels = [], []
    for row, cell in enumerate(cells):
        if isinstance(cell, Array) and cell.is_empty():  # four rows in five: spares them the way through _text
            continue
        label = _text(cell, column="failureType", row=row)
        if label is None:
            continue
        if label not in CLASS_NAMES:
            raise ValueError(
                f"Row {row}: failureType is {short(label)}, which is not a class of WM-811K. Rename it in the file to "
                f"one of {', '.join(CLASS_NAMES)}, or empty the cell to leave the row out."
            )
        rows.append(row)
        labels.append(label)
    if not rows:
        raise ValueError(f"None of the {len(cells)} rows has a failureType, so there is no label to use. {REWRITE}")
    return rows, labels


def _lots(cells: list[Any], rows: list[int]) -> np.ndarray:
    """A number for each row's lot, counted from 0 in the order in which the lots appear: int32 [N]."""
    numbers: dict[str, int] = {}
    groups = np.empty(len(rows), np.int32)
    for i, row in enumerate(rows):
        lot = _text(cells[row], column="lotName", row=row)
        if lot is None:
            raise ValueError(
                f"Row {row}: lotName is empty, but splits keep lots together. Name the lot, or empty "
                "the row's failureType to leave it out."
            )
        groups[i] = numbers.setdefault(lot, len(numbers))
    return groups


def _wafer_map(cell: Any, *, row: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A cell of waferMap as its dies, uint8 in C order, and its shape (rows, columns)."""
    if not isinstance(cell, Array):
        raise ValueError(f"Row {row}: waferMap is {short(cell)}, not an array. {REWRITE}")
    if cell.dtype().kind not in "bui":
        raise ValueError(
            f"Row {row}: waferMap has dtype {cell.dtype()}, but dies are whole numbers from 0 to {LARGEST_DIE_VALUE}. "
            "Convert it with .astype('uint8')."
        )
    dies = cell.numpy()
    if dies.ndim != 2 or not all(0 < side <= LONGEST_SIDE for side in dies.shape):
        raise ValueError(f"Row {row}: waferMap has shape {dies.shape}, but a map is a rectangle of dies. {REWRITE}")
    if dies.dtype.itemsize > 1 or dies.dtype.kind == "i":  # a cast would turn 257 and -255 into 1
        _check_values(dies, row=row)
    return dies.astype(np.uint8, copy=False).ravel(), dies.shape


def _check_values(dies: np.ndarray, *, row: int) -> None:
    wrong = dies[(dies < 0) | (dies > LARGEST_DIE_VALUE)]
    if wrong.size:
        raise ValueError(
            f"Row {row}: waferMap has the value {wrong.flat[0]}, but dies are 0 (none), 1 (pass) or 2 (fail). "
            "Correct the map, or empty the row's failureType to leave it out."
        )


def _flatten_maps(cells: list[Any], rows: list[int], *, most_dies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The maps of `rows` one after another: dies uint8 [D], offsets int64 [N+1], shapes int16 [N,2].

    A pickle can hold a map once and name it a million times, so there is a bound on all dies together.

    Empties `cells` on its way, so that no map is kept in two forms for longer than it takes to join them.
    """
    maps, shapes, total = [], np.empty((len(rows), 2), np.int16), 0
    for i, row in enumerate(rows):
        dies, shapes[i] = _wafer_map(cells[row], row=row)
        maps.append(dies)
        cells[row] = None
        total += len(dies)
        if total > most_dies:
            malformed(f"more than {most_dies:,} dies, far more than a file of its size can, in {i + 1:,} maps")
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(dies) for dies in maps], out=offsets[1:])
    flat = np.concatenate(maps)
    largest = flat.max()
    if largest > LARGEST_DIE_VALUE:
        i = int(np.searchsorted(offsets, flat.argmax(), side="right")) - 1
        _check_values(flat[offsets[i] : offsets[i + 1]], row=rows[i])
    return flat, offsets, shapes


def read_lswmd(path: Path) -> dict[str, np.ndarray]:
    """Reads the labelled maps out of `LSWMD.pkl`.

    Reads pickles written by pandas 0.14 to 3 under Python 2 or 3, in any pickle protocol. Needs no pandas.

    Args:
        path: the pickle of a frame with at least the columns waferMap, lotName and failureType. Labels may be nested
            in arrays (`array([['none']])`); a row whose failureType is empty is left out.

    Returns:
        For N labelled rows with D dies in all:
        `maps_flat` uint8 [D], the maps one after another, each row by row, 0 no die / 1 pass / 2 fail;
        `offsets` int64 [N+1], where each map starts and the last one ends;
        `shapes` int16 [N,2], rows and columns of each map;
        `labels` str [N], one of `CLASS_NAMES`;
        `group` int32 [N], the lot, numbered from 0 in order of appearance;
        `row` int32 [N], the row in the file, counted from 0.

    Raises:
        UnsafePickleError: the pickle names something that LSWMD.pkl has no use for; nothing was run.
        ValueError: not a complete pickle of such a frame, or a cell is wrong; the message says which.
        OSError: the file cannot be read.
    """
    with _no_garbage_collection():
        columns = load_columns(Path(path))
        rows, labels = _labels(columns.pop("failureType"))
        group = _lots(columns.pop("lotName"), rows)
        maps = columns.pop("waferMap")
        for row in set(range(len(maps))).difference(rows):
            maps[row] = None  # most of the file is unlabelled: give that memory back before the copy is made
        most_dies = max(2**26, 2 * Path(path).stat().st_size)
        flat, offsets, shapes = _flatten_maps(maps, rows, most_dies=most_dies)
    return {
        "maps_flat": flat,
        "offsets": offsets,
        "shapes": shapes,
        "labels": np.array(labels),
        "group": group,
        "row": np.array(rows, np.int32),
    }


def _fingerprint(path: Path) -> str:
    """Size and date of the pickle: enough to notice another file, without reading two gigabytes for a checksum."""
    status = path.stat()
    return f"layout {CACHE_LAYOUT}, {path.name}, {status.st_size} bytes, modified {status.st_mtime_ns}"


def _is_current(cache: Path, pickle_path: Path) -> bool:
    """Whether `cache` holds the arrays of `pickle_path` as it is now.

    Raises:
        ValueError: `cache` is not one that this module wrote, so it is not overwritten.
    """
    if not cache.exists():
        return False
    try:
        source = str(read_npz(cache, ["source"])["source"])
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{cache} is in the way: the converted copy of {pickle_path.name} belongs there, but this file has no "
            "`source` entry, so it was not made from it. Move it away, or delete it."
        ) from error
    return source == _fingerprint(pickle_path) and cache.stat().st_mtime_ns >= pickle_path.stat().st_mtime_ns


def convert_lswmd(path: Path, *, say: Callable[[str], None] = lambda text: None) -> Path:
    """Converts `LSWMD.pkl` into `LSWMD.npz` beside it, once; later calls find the copy and only check its date.

    The copy holds the arrays of `read_lswmd` and `source`, a text that identifies the pickle it was made from. It is
    written under another name and then moved into place, so that it is either complete or absent.

    Args:
        path: the pickle.
        say: prints a line when it has to be converted.

    Returns:
        The path of the copy, to be opened with `numpy.load(path, allow_pickle=False)`.

    Raises:
        UnsafePickleError, ValueError, OSError: as `read_lswmd`.
        ValueError: another file has the copy's name.
        PermissionError: the folder cannot be written to.
    """
    path = Path(path)
    cache = path.with_suffix(".npz")
    if _is_current(cache, path):
        return cache
    half = cache.with_name(f".{cache.name}.{secrets.token_hex(8)}.tmp")  # in containers, process numbers are alike
    try:
        file = half.open("xb")  # before the reading, so that a folder that cannot be written to shows at once
    except OSError as error:
        raise PermissionError(
            f"Cannot write the converted copy {cache}: {error.strerror}. Copy {path.name} into a folder that you can "
            "write to, or use read_lswmd, which writes nothing."
        ) from error
    say(f"  converts {path.name} into {cache.name}, once; for the 2 GB of WM-811K that takes about a minute")
    try:
        with file:
            source = _fingerprint(path)  # taken first: a pickle that changes while it is read is then read again
            np.savez_compressed(file, **read_lswmd(path), source=np.array(source))
        os.replace(half, cache)
    finally:
        half.unlink(missing_ok=True)
    return cache

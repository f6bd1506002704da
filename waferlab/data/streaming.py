"""Wafer maps of any source a chunk at a time, so that a file may be larger than the memory. Labels need not be known.

Of an .npz the dies are inflated as they are asked for; only what is a few bytes a map (shapes, labels, lots) is read
before. Of images the names are. All that is known before the dies is checked before the first map is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from waferlab.data.generator import generate_wafer_maps
from waferlab.data.image_files import (
    IMAGE_SUFFIXES,
    choose_levels,
    class_of_folder,
    images_in,
    levels_in_words,
    read_image,
)
from waferlab.data.maps import CLASS_NAMES, check_places, check_sides
from waferlab.data.npz import names_in_npz, read_headers, read_npz, stream_array
from waferlab.data.reading import MIXEDWM38_COLUMNS, SYNTHETIC, check_is_a_file, whole_numbers
from waferlab.errors import DataError

MAPS_AT_ONCE = 2000
DIES_AT_ONCE = 2**24  # 16 MiB: the largest maps allowed come 16 at a time
DIES = ("maps_flat", "maps", "arr_0")  # arrays that are read as a stream, one of them a file
BESIDE_DIES = ("offsets", "shapes", "labels", "group", "row", "arr_1")


@dataclass(frozen=True, eq=False)
class MapChunk:
    """The next N maps of a source.

    Attributes:
        ids: by which a map is found again: its number in the file, or the name of its image.
        maps: each uint8 [rows, columns], 0 no die, 1 pass, 2 fail; not to be written to.
        lots: "" where the lot is not known.
        labels: "" where the class is not known; any text, as it stands in the file.
        left_out: how many maps of the source before these had die values that no map has.
    """

    ids: list[str]
    maps: list[np.ndarray]
    lots: list[str]
    labels: list[str]
    left_out: int = 0


@dataclass(frozen=True, eq=False)
class MapStream:
    """Maps that are read while one iterates over their chunks, which can be done again.

    Attributes:
        source: where the maps come from, for people.
        total: number of maps.
        label_names: gives the labels that there are, each once.
        read: gives the chunks; the first holds a single map, so that its answer need not wait.
        notes: what was interpreted, for people.
    """

    source: str
    total: int
    label_names: Callable[[], tuple[str, ...]]
    read: Callable[[], Iterator[MapChunk]]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[MapChunk]:
        return self.read()


def stream_wafer_maps(
    source: str | Path, *, image_levels: str = "auto", say: Callable[[str], None] = lambda text: None
) -> MapStream:
    """Opens a source of maps.

    Args:
        source: "synthetic"; an .npz in this project's layouts or MixedWM38's, with labels or without; an `LSWMD.pkl`
            (converted once into an .npz beside it, of its labelled rows); a folder of images, or of folders of images
            that are named like the classes; one image.
        image_levels: as in `reading.load_wafer_maps`.
        say: prints a line, before a conversion that takes a while.

    Raises:
        DataError: the source does not exist or cannot be used; while iterating, it is damaged further on.
    """
    if str(source) == SYNTHETIC:
        return _stream_synthetic()
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder. Give {SYNTHETIC!r}, a .npz, LSWMD.pkl, an image or a folder of images."
        )
    if path.is_dir():
        return _stream_images(_images_below(path), source=path.name, levels=image_levels)
    check_is_a_file(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _stream_images([(path.name, path, "")], source=path.name, levels=image_levels)
    try:
        if path.suffix == ".pkl":
            from waferlab.data.lswmd import convert_lswmd

            return _stream_npz(convert_lswmd(path, say=say))
        if path.suffix == ".npz":
            return _stream_npz(path)
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}. Give a .npz, LSWMD.pkl, an image ({_suffixes()}) or a folder "
        "of images."
    )


def _spans(dies: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each chunk of maps with so many dies, int64 [N]: first one map, then many, but not too large."""
    ends, start, most = np.cumsum(dies), 0, 1
    while start < len(dies):
        fit = np.searchsorted(ends, ends[start] - dies[start] + DIES_AT_ONCE, side="right")
        stop = max(start + 1, min(start + most, int(fit)))
        yield start, stop
        start, most = stop, MAPS_AT_ONCE


# ------------------------------------------------------------------------------------------------- generated maps


def _stream_synthetic() -> MapStream:
    drawn, labels, lots = generate_wafer_maps(150, seed=0)

    def read() -> Iterator[MapChunk]:
        for start, stop in _spans(np.array([one.size for one in drawn])):
            names = [CLASS_NAMES[label] for label in labels[start:stop]]
            ids, of_lots = list(map(str, range(start, stop))), list(map(str, lots[start:stop]))
            yield MapChunk(ids, list(drawn[start:stop]), of_lots, names)

    return MapStream("synthetic (seed 0)", len(drawn), lambda: CLASS_NAMES, read)


# --------------------------------------------------------------------------------------------------------- images


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _images_below(folder: Path) -> list[tuple[str, Path, str]]:
    """Id, file and label of the images in a folder and in its sub-folders, whose names are the labels."""
    found = [(path.name, path, "") for path in images_in(folder)]
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        label = class_of_folder(sub.name) or sub.name
        found += [(f"{sub.name}/{path.name}", path, label) for path in images_in(sub)]
    if not found:
        raise DataError(f"{folder}: no images in it or in its sub-folders. Supported: {_suffixes()}.")
    return found


def _stream_images(images: Sequence[tuple[str, Path, str]], *, source: str, levels: str) -> MapStream:
    levels = choose_levels([path for _, path, _ in images], levels)

    def read() -> Iterator[MapChunk]:
        start, most = 0, 1
        while start < len(images):
            some, maps, dies = images[start : start + most], [], 0
            for _, path, _ in some:
                maps.append(read_image(path, levels))
                dies += maps[-1].size
                if dies >= DIES_AT_ONCE:
                    break
            ids, _, labels = zip(*some[: len(maps)], strict=True)
            yield MapChunk([*map(_as_unicode, ids)], maps, [""] * len(maps), [*map(_as_unicode, labels)])
            start, most = start + len(maps), MAPS_AT_ONCE

    names = tuple(sorted({_as_unicode(label) for _, _, label in images} - {""}))
    return MapStream(
        _as_unicode(source), len(images), lambda: names, read, (f"Images read as {levels_in_words(levels)}.",)
    )


# ----------------------------------------------------------------------------------------------------------- .npz


def _stream_npz(path: Path) -> MapStream:
    headers = read_headers(path, (*DIES, *BESIDE_DIES))
    name = next((name for name in DIES if name in headers), None)
    if name is None:
        raise DataError(
            f"{path}: holds {names_in_npz(path)}. Expected maps_flat, offsets, shapes; or maps [N,H,W]; or MixedWM38's "
            "arr_0 and arr_1."
        )
    arrays = read_npz(path, [other for other in BESIDE_DIES if other in headers])
    dies, dtype = headers[name].shape, headers[name].dtype
    if max(dies, default=0) >= 2**62:
        raise DataError(f"{path.name}: {name} is {dies}, which no array can be.")
    if dtype != np.uint8 and not (name == "arr_0" and dtype.kind in "biu"):
        raise DataError(f"{path.name}: {name} are {dtype}, not uint8. Save them with .astype('uint8').")
    shapes = _shapes_of_flat(arrays, dies, source=path.name) if name == "maps_flat" else None
    if shapes is None:
        if len(dies) != 3:
            raise DataError(f"{path.name}: {name} is {dies}. Expected [N, rows, columns].")
        one = np.array([dies[1:]], dtype=np.int64)
        check_sides(one, source=path.name)
        shapes = np.broadcast_to(one, (dies[0], 2))
    if not len(shapes):
        raise DataError(f"{path.name}: holds no maps.")
    known = _Known.of(arrays, len(shapes), mixed=name == "arr_0", source=path.name)
    return MapStream(
        _as_unicode(path.name), len(shapes), known.label_names, partial(_read_npz, path, name, shapes, known)
    )


def _shapes_of_flat(arrays: dict[str, np.ndarray], dies: tuple[int, ...], *, source: str) -> np.ndarray:
    """int64 [N, 2], the rows and columns of maps that lie one after the other in an array of shape `dies`."""
    if missing := {"offsets", "shapes"} - arrays.keys():
        raise DataError(f"{source}: {sorted(missing)} missing beside maps_flat. Expected maps_flat, offsets, shapes.")
    offsets, shapes = (whole_numbers(arrays[name], name=name, source=source) for name in ("offsets", "shapes"))
    if len(dies) != 1 or shapes.ndim != 2 or shapes.shape[1] != 2 or offsets.shape != (len(shapes) + 1,):
        raise DataError(
            f"{source}: maps_flat {dies}, shapes {shapes.shape}, offsets {offsets.shape}. Expected maps_flat [P], "
            "shapes [N, 2] and offsets [N+1]."
        )
    check_places(shapes, offsets, dies=dies[0], source=source)
    return shapes


@dataclass(frozen=True, eq=False)
class _Known:
    """What an .npz says of its maps beside their dies, each an array [N] of texts or numbers; None if it does not."""

    row: np.ndarray | None
    group: np.ndarray | None
    labels: np.ndarray | None

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], n: int, *, mixed: bool, source: str) -> _Known:
        labels = _single_patterns(arrays.get("arr_1"), n, source=source) if mixed else arrays.get("labels")
        if labels is not None and (labels.shape != (n,) or labels.dtype.kind not in "US"):
            raise DataError(f"{source}: labels are {labels.dtype} {labels.shape}. Expected {n} class names, or none.")
        group, row = arrays.get("group"), arrays.get("row")
        if group is not None and (group.shape != (n,) or group.dtype.kind not in "biufSU"):
            raise DataError(
                f"{source}: group is {group.dtype} {group.shape}. Expected a number or a text for each of {n} maps."
            )
        if row is not None and (row.shape != (n,) or row.dtype.kind not in "iu"):
            row = None
        return cls(row, group, labels)

    def label_names(self) -> tuple[str, ...]:
        """The labels that there are, but for "", sorted."""
        return () if self.labels is None else tuple(name for name in _texts(np.unique(self.labels)) if name)

    def between(self, start: int, stop: int) -> tuple[list[str], list[str], list[str]]:
        """Ids, lots and labels of some maps."""
        unknown = [""] * (stop - start)
        ids = list(map(str, range(start, stop))) if self.row is None else _texts(self.row[start:stop])
        lots = unknown if self.group is None else _texts(self.group[start:stop])
        return ids, lots, unknown if self.labels is None else _texts(self.labels[start:stop])


def _as_unicode(text: str) -> str:
    """A name in letters that can be written, whatever bytes or numbers were kept for it."""
    return text.encode(errors="backslashreplace").decode()


def _texts(values: np.ndarray) -> list[str]:
    """Numbers and texts as text; NaN as "", a whole number without its decimals."""
    kind, plain = values.dtype.kind, values.tolist()
    if kind == "S":
        return [text.decode("utf-8", "replace").strip() for text in plain]
    if kind == "f":
        return ["" if x != x else str(int(x)) if x.is_integer() else str(x) for x in plain]
    return [_as_unicode(str(x).strip()) for x in plain]


def _single_patterns(columns: np.ndarray | None, n: int, *, source: str) -> np.ndarray | None:
    """Class names [N] from MixedWM38's label columns; "" for a mixture, which is not one class."""
    if columns is None:
        return None
    if columns.shape != (n, len(MIXEDWM38_COLUMNS)) or columns.dtype.kind not in "biu":
        raise DataError(
            f"{source}: arr_1 is {columns.dtype} {columns.shape}. MixedWM38 has whole numbers [{n}, 8] beside its maps."
        )
    patterns = (columns != 0).sum(1)
    names = np.where(patterns == 0, "none", np.array(MIXEDWM38_COLUMNS)[columns.argmax(1)])
    return np.where(patterns > 1, "", names)


def _read_npz(path: Path, name: str, shapes: np.ndarray, known: _Known) -> Iterator[MapChunk]:
    try:
        with stream_array(path, name) as array:
            for start, stop in _spans(shapes.prod(1)):
                ends = np.cumsum(shapes[start:stop].prod(1))
                dies = array.read(int(ends[-1]) if len(array.shape) == 1 else stop - start).reshape(-1)
                yield _chunk(dies, ends, shapes[start:stop], known.between(start, stop), mixed=name == "arr_0")
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(str(error)) from error


def _chunk(
    dies: np.ndarray, ends: np.ndarray, shapes: np.ndarray, known: tuple[list[str], ...], *, mixed: bool
) -> MapChunk:
    """Cuts the dies, one map after the other, into maps that end at `ends`.

    The published MixedWM38 holds a few maps with dies of value 3, which are left out; elsewhere such a value is an
    error, since it is likely to mean that the values mean something else.
    """
    starts = np.concatenate([[0], ends[:-1]])
    right = np.maximum.reduceat(dies, starts) <= 2
    if dies.dtype.kind == "i":
        right &= np.minimum.reduceat(dies, starts) >= 0
    ids, lots, labels = known
    if not right.all() and not mixed:
        wrong = int(right.argmin())
        raise DataError(
            f"map {ids[wrong]} has the die value {dies[starts[wrong] : ends[wrong]].max()}. Only 0 (no die), 1 (pass) "
            "and 2 (fail) are allowed."
        )
    dies, kept = dies.astype(np.uint8, copy=False), np.flatnonzero(right).tolist()
    maps = [dies[starts[i] : ends[i]].reshape(shapes[i]) for i in kept]
    ids, lots, labels = ([some[i] for i in kept] for some in (ids, lots, labels))
    return MapChunk(ids, maps, lots, labels, left_out=len(right) - len(kept))

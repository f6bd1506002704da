"""Wafer maps in memory: uint8 images of dies, 0 no die, 1 pass, 2 fail, of any size, kept flat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from waferlab.errors import DataError

CLASS_NAMES = ("Center", "Donut", "Edge-Loc", "Edge-Ring", "Loc", "Near-full", "Random", "Scratch", "none")
NUM_CLASSES = len(CLASS_NAMES)
MAX_MAP_SIDE = 1024  # dies; the largest map of WM-811K has 212


@dataclass(frozen=True, eq=False)
class WaferMaps:
    """A set of labelled wafer maps at their native sizes.

    Attributes:
        maps_flat: uint8 [P], all dies of all maps one after the other, values 0 no die, 1 pass, 2 fail.
        offsets: int64 [N+1], map i is `maps_flat[offsets[i]:offsets[i+1]]`.
        shapes: int64 [N, 2], rows and columns of each map.
        labels: int64 [N], index into `CLASS_NAMES`.
        groups: int64 [N], the lot of each map; maps of unknown lot are a lot of their own.
        source: where the maps come from, for people.
        notes: what was left out or interpreted while reading, for people.
    """

    maps_flat: np.ndarray
    offsets: np.ndarray
    shapes: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    source: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_layout(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """Map `index` as uint8 [rows, columns]."""
        return self.maps_flat[self.offsets[index] : self.offsets[index + 1]].reshape(self.shapes[index])

    @property
    def n_lots(self) -> int:
        """Number of lots that the maps come from."""
        return len(np.unique(self.groups))

    @property
    def class_counts(self) -> np.ndarray:
        """int64 [9], maps of each class."""
        return np.bincount(self.labels, minlength=NUM_CLASSES)

    def digests(self) -> np.ndarray:
        """uint64 [N], equal for maps that are turned or mirrored copies of one another; computed once.

        A map's digest depends on its dies and size alone, so that digests can be kept and compared with those of other
        data later: BLAKE2b of the first, in byte order, of its eight views, those with more rows than columns left out.
        """
        return self._digests

    @cached_property
    def _digests(self) -> np.ndarray:
        digests = np.array([_digest(self[i]) for i in range(len(self))], dtype=np.uint64)
        digests.flags.writeable = False
        return digests

    def select(self, indices: np.ndarray, *, note: str = "") -> WaferMaps:
        """The maps at `indices` (int64 [M]), in that order."""
        return pack_maps(
            [self[i] for i in indices],
            self.labels[indices],
            groups=self.groups[indices],
            source=self.source,
            notes=(*self.notes, note) if note else self.notes,
        )


def _digest(one: np.ndarray) -> int:
    """The number below 2**64 that `WaferMaps.digests` describes, of one uint8 [h, w] map."""
    rows, columns = one.shape
    upright = one.T if rows > columns else one
    views = [upright, upright[::-1], upright[:, ::-1], upright[::-1, ::-1]]
    if rows == columns:
        views += [view.T for view in views]
    first, size = min(view.tobytes() for view in views), b"%dx%d" % upright.shape
    return int.from_bytes(hashlib.blake2b(first, digest_size=8, key=size).digest(), "little")


def _check_layout(maps: WaferMaps) -> None:
    n = len(maps.labels)
    if n == 0:
        raise DataError(f"{maps.source}: holds no labelled maps. Give a file with at least a few maps of each class.")
    if maps.shapes.shape != (n, 2) or maps.offsets.shape != (n + 1,) or maps.groups.shape != (n,):
        raise DataError(
            f"{maps.source}: {n} labels, but shapes {maps.shapes.shape}, offsets {maps.offsets.shape}, group "
            f"{maps.groups.shape}. Expected shapes [N, 2], offsets [N+1] and group [N] with N = {n}."
        )
    if maps.maps_flat.dtype != np.uint8:
        raise DataError(f"{maps.source}: maps are {maps.maps_flat.dtype}, not uint8. Save them with .astype('uint8').")
    if maps.maps_flat.ndim != 1:
        raise DataError(f"{maps.source}: maps_flat is {maps.maps_flat.shape}. Expected one row of dies, [P].")
    check_places(maps.shapes, maps.offsets, dies=len(maps.maps_flat), source=maps.source)
    top = int(maps.maps_flat.max())
    if top > 2:
        raise DataError(f"{maps.source}: die value {top}. Only 0 (no die), 1 (pass) and 2 (fail) are allowed.")


def check_sides(shapes: np.ndarray, *, source: str) -> None:
    """Raises DataError unless all rows and columns, int64 [N, 2], are such as a map may have."""
    odd = ((shapes < 1) | (shapes > MAX_MAP_SIDE)).any(1)
    if odd.any():
        rows, columns = shapes[odd][0]
        raise DataError(f"{source}: a map of {rows}x{columns} dies. Sides must be 1 to {MAX_MAP_SIDE} dies.")


def check_places(shapes: np.ndarray, offsets: np.ndarray, *, dies: int, source: str) -> None:
    """Raises DataError unless maps of these shapes, int64 [N, 2], follow each other at these offsets, int64 [N+1].

    The last one ends at the last of so many dies.
    """
    check_sides(shapes, source=source)
    if not (np.diff(offsets) == shapes.prod(1)).all() or offsets[0] != 0 or offsets[-1] != dies:
        raise DataError(f"{source}: offsets do not fit the shapes. offsets[i+1] - offsets[i] must be rows*columns.")


def pack_maps(
    maps: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    source: str,
    notes: tuple[str, ...] = (),
) -> WaferMaps:
    """Packs a list of uint8 [h, w] maps with labels int64 [N] into a `WaferMaps`."""
    shapes = np.array([m.shape for m in maps], dtype=np.int64).reshape(-1, 2)
    return WaferMaps(
        maps_flat=np.concatenate([m.ravel() for m in maps]) if len(maps) else np.zeros(0, np.uint8),
        offsets=np.concatenate([[0], np.cumsum(shapes.prod(1))]).astype(np.int64),
        shapes=shapes,
        labels=np.asarray(labels, dtype=np.int64),
        groups=np.arange(len(maps)) if groups is None else np.asarray(groups, dtype=np.int64),
        source=source,
        notes=notes,
    )

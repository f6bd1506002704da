"""Wafer maps from any source, split without leaks, and served to Lightning in batches.

A wafer map is a small uint8 image of dies: 0 no die, 1 pass, 2 fail. Sizes differ from product to product, so a set
of maps is kept flat (`WaferMaps`) and resized once into one uint8 tensor. After that a batch is a single indexing
operation; encoding and augmentation run on the whole batch, on whatever device it was sent to. There are no worker
processes: with maps this small, starting them costs more than they give.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from errors import DataError
from npz_reader import names_in_npz, read_npz
from wafer_generator import CLASS_NAMES, generate_wafer_maps

SYNTHETIC = "synthetic"
NUM_CLASSES = len(CLASS_NAMES)
IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"}
IMAGE_LEVELS = ("auto", "three", "binary")
MAX_MAP_SIDE = 1024  # dies; the largest map of WM-811K has 212
LEVEL_SCALE = 127  # resized maps keep grey values between the levels: 0 no die, 127 pass, 254 fail
DIE_NOISE = 0.01  # share of pixels whose pass and fail are swapped during augmentation

ARRAY_NAMES = ("maps_flat", "offsets", "shapes", "labels", "group", "maps", "arr_0", "arr_1")  # read from an .npz

# Order of the eight label columns in MixedWM38 (J. Wang et al., IEEE Trans. Semicond. Manuf. 33(4), 2020).
MIXEDWM38_COLUMNS = ("Center", "Donut", "Edge-Loc", "Edge-Ring", "Loc", "Near-full", "Scratch", "Random")


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
    sides_ok = (maps.shapes >= 1).all() and (maps.shapes <= MAX_MAP_SIDE).all()
    if not sides_ok:
        bad = maps.shapes[((maps.shapes < 1) | (maps.shapes > MAX_MAP_SIDE)).any(1)][0]
        raise DataError(f"{maps.source}: a map of {bad[0]}x{bad[1]} dies. Sides must be 1 to {MAX_MAP_SIDE} dies.")
    areas_match = (np.diff(maps.offsets) == maps.shapes.prod(1)).all()
    if not areas_match or maps.offsets[0] != 0 or maps.offsets[-1] != len(maps.maps_flat):
        raise DataError(
            f"{maps.source}: offsets do not fit the shapes. offsets[i+1] - offsets[i] must be rows*columns."
        )
    top = int(maps.maps_flat.max())
    if top > 2:
        raise DataError(f"{maps.source}: die value {top}. Only 0 (no die), 1 (pass) and 2 (fail) are allowed.")


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


# ---------------------------------------------------------------------------------------------------- reading


def load_wafer_maps(
    data: str | Path = SYNTHETIC,
    *,
    samples_per_class: int = 150,
    max_samples_per_class: int | None = None,
    image_levels: str = "auto",
    seed: int = 0,
) -> WaferMaps:
    """Reads or generates wafer maps.

    Args:
        data: "synthetic"; an `LSWMD.pkl` (converted once into an .npz beside it); an .npz in this project's layout or
            MixedWM38's; or a folder with one sub-folder of images for each class.
        samples_per_class: maps a class to generate (synthetic only).
        max_samples_per_class: keep at most this many of each class, drawn at random by `seed`.
        image_levels: how images are read: "three" grey levels (no die, pass, fail), "binary" (bright dies fail) or
            "auto", which takes "three" when the images hold mid-greys.
        seed: of the generator and of the draw.

    Raises:
        DataError: the path does not exist or its content cannot be used.
    """
    if str(data) == SYNTHETIC:
        drawn, labels, lots = generate_wafer_maps(samples_per_class, seed=seed)
        maps = pack_maps(drawn, labels, groups=lots, source=f"synthetic (seed {seed})")
    else:
        maps = _read_path(Path(data).expanduser(), image_levels=image_levels)
    if max_samples_per_class is not None:
        maps = _at_most(maps, max_samples_per_class, seed=seed)
    return maps


def _read_path(path: Path, *, image_levels: str) -> WaferMaps:
    if not path.exists():
        raise DataError(f"--data {path}: no such file or folder. Give {SYNTHETIC!r}, a .npz, LSWMD.pkl or a folder.")
    if path.is_dir():
        return _read_image_folder(path, levels=image_levels)
    if path.suffix == ".pkl":
        from lswmd_reader import convert_lswmd

        try:
            return _read_npz(convert_lswmd(path))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(str(error)) from error
    if path.suffix == ".npz":
        return _read_npz(path)
    raise DataError(
        f"--data {path}: unknown kind of file {path.suffix!r}. Give a .npz, LSWMD.pkl or a folder of images."
    )


def _read_npz(path: Path) -> WaferMaps:
    try:
        arrays = read_npz(path, ARRAY_NAMES)
    except ValueError as error:
        raise DataError(str(error)) from error
    if {"arr_0", "arr_1"} <= arrays.keys():
        return _from_mixedwm38(arrays["arr_0"], arrays["arr_1"], source=path.name)
    if "labels" not in arrays or not ({"maps", "maps_flat"} & arrays.keys()):
        raise DataError(
            f"{path}: holds {names_in_npz(path)}. Expected maps_flat, offsets, shapes, labels; or maps [N,H,W] and "
            "labels."
        )
    labels = _label_indices(arrays["labels"], source=path.name)
    groups, notes = np.arange(len(labels)), ()
    if "group" in arrays:
        groups, notes = _lot_numbers(arrays["group"], n=len(labels), source=path.name)
    if "maps" in arrays:
        return replace(_from_dense(arrays["maps"], labels, groups, source=path.name), notes=notes)
    missing = {"offsets", "shapes"} - arrays.keys()
    if missing:
        raise DataError(
            f"{path}: {sorted(missing)} missing beside maps_flat. Expected maps_flat, offsets, shapes, labels."
        )
    return WaferMaps(
        maps_flat=arrays["maps_flat"],
        offsets=_whole_numbers(arrays["offsets"], name="offsets", source=path.name),
        shapes=_whole_numbers(arrays["shapes"], name="shapes", source=path.name),
        labels=labels,
        groups=groups,
        source=path.name,
        notes=notes,
    )


def _whole_numbers(values: np.ndarray, *, name: str, source: str) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise DataError(f"{source}: {name} are {values.dtype}, not whole numbers. Save them with .astype('int64').")
    return values.astype(np.int64)


def _lot_numbers(lots: np.ndarray, *, n: int, source: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Lots named by text or number, one a map, to int64 numbers and a note on maps whose lot is unknown.

    Whole numbers stay what they are; other names are numbered. A map whose lot is empty or NaN is a lot of its own.
    """
    if lots.shape != (n,) or lots.dtype.kind not in "biufSU":
        raise DataError(
            f"{source}: group is {lots.dtype} {lots.shape}. Expected a number or a text for each of {n} maps."
        )
    is_text = lots.dtype.kind in "SU"
    known = np.char.strip(lots) != lots.dtype.type() if is_text else lots == lots  # NaN is not itself
    names = lots[known]
    if is_text or not _fit_int64(names):
        names = np.unique(names, return_inverse=True)[1]
    numbers = np.empty(n, dtype=np.int64)
    numbers[known] = names
    unknown = int(n - known.sum())
    numbers[~known] = numbers[known].max(initial=-1) + 1 + np.arange(unknown)
    return numbers, (f"{unknown:,} maps of unknown lot: each is a lot of its own.",) if unknown else ()


def _fit_int64(numbers: np.ndarray) -> bool:
    """Whether all are whole and small enough to be counted on from."""
    return bool((np.abs(numbers.astype(np.float64)) < 2**53).all() and (numbers == np.floor(numbers)).all())


def _from_dense(maps: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, source: str) -> WaferMaps:
    if maps.ndim != 3 or len(maps) != len(labels):
        raise DataError(f"{source}: maps {maps.shape} for {len(labels)} labels. Expected maps [N, H, W] with N labels.")
    n, rows, columns = maps.shape
    return WaferMaps(
        maps_flat=maps.reshape(-1),
        offsets=np.arange(n + 1, dtype=np.int64) * rows * columns,
        shapes=np.tile(np.array([[rows, columns]], dtype=np.int64), (n, 1)),
        labels=labels,
        groups=groups,
        source=source,
    )


def _from_mixedwm38(maps: np.ndarray, columns: np.ndarray, *, source: str) -> WaferMaps:
    """MixedWM38: single patterns and defect-free maps fit nine classes; mixtures do not and are left out."""
    if maps.ndim != 3 or columns.shape != (len(maps), len(MIXEDWM38_COLUMNS)):
        raise DataError(
            f"{source}: arr_0 {maps.shape}, arr_1 {columns.shape}. MixedWM38 has maps [N, H, W] and labels [N, 8]."
        )
    if maps.dtype.kind not in "biu" or not np.isin(columns, (0, 1)).all():
        raise DataError(
            f"{source}: arr_0 is {maps.dtype}, arr_1 has values {np.unique(columns)[:3]}. Die values are whole numbers "
            "and labels are 0 or 1; save the maps with .astype('uint8')."
        )
    patterns = (columns != 0).sum(1)
    odd = ((maps < 0) | (maps > 2)).any((1, 2))  # the published file holds a few dies of value 3
    keep = (patterns <= 1) & ~odd
    names = np.where(patterns == 0, "none", np.array(MIXEDWM38_COLUMNS)[columns.argmax(1)])[keep]
    note = (
        f"MixedWM38: {int((patterns[keep] == 1).sum()):,} single-pattern and {int((patterns[keep] == 0).sum()):,} "
        f"defect-free maps kept; left out: {int((patterns > 1).sum()):,} mixed, "
        f"{int((odd & (patterns <= 1)).sum()):,} with die values other than 0 to 2. Lots are not in this file."
    )
    dense = _from_dense(
        maps[keep].astype(np.uint8),
        _label_indices(names, source=source),
        np.arange(int(keep.sum()), dtype=np.int64),
        source=source,
    )
    return replace(dense, notes=(note,))


def _label_indices(labels: np.ndarray, *, source: str) -> np.ndarray:
    """Class names to int64 indices into CLASS_NAMES."""
    if labels.ndim != 1 or labels.dtype.kind not in "US":
        raise DataError(f"{source}: labels are {labels.dtype} {labels.shape}. Expected class names, str [N].")
    names = np.array(CLASS_NAMES).astype(labels.dtype.kind)
    unknown = sorted(set(labels.tolist()) - set(names.tolist()))
    if unknown:
        raise DataError(f"{source}: unknown label {unknown[0]!r}. Allowed: {', '.join(CLASS_NAMES)}.")
    order = np.argsort(names)
    return order[np.searchsorted(names[order], labels)].astype(np.int64)


def _read_image_folder(folder: Path, *, levels: str) -> WaferMaps:
    """One sub-folder for each class, named like the class; each image is one map, a pixel a die."""
    by_name = {name.lower(): index for index, name in enumerate(CLASS_NAMES)}
    images, labels = [], []
    sub_folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not sub_folders:
        raise DataError(f"{folder}: no class folders in it. Expected sub-folders named {', '.join(CLASS_NAMES)}.")
    for sub in sub_folders:
        label = by_name.get(sub.name.lower().replace("_", "-").replace(" ", "-"))
        if label is None:
            raise DataError(f"{folder}: unknown class folder {sub.name!r}. Allowed: {', '.join(CLASS_NAMES)}.")
        files = sorted(p for p in sub.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        images += [_read_grey(p) for p in files]
        labels += [label] * len(files)
    if not images:
        raise DataError(f"{folder}: no images in the class folders. Supported: {', '.join(sorted(IMAGE_SUFFIXES))}.")
    if levels == "auto":
        has_middle = any(((g > 63) & (g < 192)).mean() > 0.05 for g in images)
        levels = "three" if has_middle else "binary"
    read = _three_levels if levels == "three" else _two_levels
    how = {
        "three": "three grey levels: below 64 no die, 64-191 pass, 192 and above fail",
        "binary": "two levels: 128 and above fail, the rest pass, no die outside the inscribed ellipse",
    }[levels]
    note = f"Images read as {how} (image_levels={levels!r}). Lots are not known: each image is its own."
    return pack_maps([read(g) for g in images], np.array(labels), source=folder.name, notes=(note,))


def _read_grey(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_MAP_SIDE:
                raise DataError(
                    f"{path}: {image.size[0]}x{image.size[1]} pixels. At most {MAX_MAP_SIDE}: a pixel a die."
                )
            return np.asarray(image.convert("L"))
    except (UnidentifiedImageError, OSError, ImportError) as error:  # ultralytics, once loaded, asks for a plugin
        raise DataError(f"{path}: not a readable image ({error}). Remove it or save it as .png.") from error


def _three_levels(grey: np.ndarray) -> np.ndarray:
    return np.digitize(grey, (64, 192)).astype(np.uint8)


def _two_levels(grey: np.ndarray) -> np.ndarray:
    rows, columns = grey.shape
    y, x = np.ogrid[:rows, :columns]
    outside = ((y + 0.5) / rows * 2 - 1) ** 2 + ((x + 0.5) / columns * 2 - 1) ** 2 > 1
    fails = grey >= 128
    return np.where(fails, 2, np.where(outside, 0, 1)).astype(np.uint8)


def _at_most(maps: WaferMaps, limit: int, *, seed: int) -> WaferMaps:
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(maps.labels == c))[:limit] for c in range(NUM_CLASSES)]
    indices = np.sort(np.concatenate(kept))
    if len(indices) == len(maps):
        return maps
    return maps.select(indices, note=f"At most {limit} maps a class: {len(indices):,} of {len(maps):,} kept.")


# --------------------------------------------------------------------------------------------------- splitting


PARTS = ("train", "validation", "test")
SHARES = np.array([0.70, 0.15, 0.15])
LEAST_FOR_TRAINING = 0.60  # of all maps
NEAR = 0.05  # a share that is further off is named in a note

# What the search for a good split weighs against each other. A class costs the sum over the parts of (share - what it
# should be) squared, all maps together this many times as much, and then come the things that are far worse:
WEIGHT_OF_ALL = 3.0
COST_OF_SMALL_TRAINING = 100.0  # times what training lacks of 60% of the maps, as a share of them
COST_OF_MISSING = np.array([1e5, 1e3, 1e3])  # for each class that a part should have and lacks
WORTH_A_CHANGE = 1e-4  # one class, one percentage point off
PAIRS_A_ROUND = 4096
ROUNDS_IN_VAIN = 8
DEALS = 3


@dataclass(frozen=True, eq=False)
class Split:
    """Indices (int64, sorted) of the three parts, and a fingerprint that changes with any map or assignment.

    `notes` say, for people, where shares or classes could not be had.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    fingerprint: str
    notes: tuple[str, ...] = ()

    def parts(self) -> dict[str, np.ndarray]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def split_by_lot(maps: WaferMaps, *, seed: int = 0) -> Split:
    """Splits 70/15/15 so that no lot, and no copy of a map, is in two parts; each class near these shares.

    Lots that share a copy of a map, turned and mirrored ones included, stay together; maps without a failing die are
    all alike and tie no lots. These units are dealt at random, class by class, so that a large one is as likely in the
    test part as a small one. Then single units are moved or swapped while that brings the shares clearly nearer to
    70/15/15. A class with three units or more is in all parts, with two in training and test, with one in training.

    Raises:
        DataError: fewer than two classes, or too few units for three parts.
    """
    units = _lots_joined_by_copies(maps)
    n_units = int(units.max()) + 1
    table = np.bincount(units * NUM_CLASSES + maps.labels, minlength=n_units * NUM_CLASSES)
    table = table.reshape(n_units, NUM_CLASSES)[:, maps.class_counts > 0]
    if table.shape[1] < 2 or n_units < 3:
        raise DataError(
            f"{maps.source}: {table.shape[1]} class(es) in {n_units} lot(s), lots that share copies of maps counted as "
            "one. A split needs two classes and three lots at the least. Add maps of other lots."
        )
    part = _best_deal(table, np.random.default_rng(seed))
    train, validation, test = (np.flatnonzero(part[units] == p) for p in range(3))
    if not len(validation) or not len(test):
        raise DataError(
            f"{maps.source}: nearly every one of the {n_units} lots is the only one of some class, so training needs "
            "them all and nothing is left for validation and test. Add maps of these classes from other lots."
        )
    notes = _notes_on(table, part, class_counts=maps.class_counts)
    return Split(train, validation, test, _fingerprint(maps, (train, validation, test)), notes)


def _lots_joined_by_copies(maps: WaferMaps) -> np.ndarray:
    """int64 [N]: the number of each map's lot, from 0; lots that share a map with a failing die have one number."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    lots, lot_of = np.unique(maps.groups, return_inverse=True)
    has_failing = np.maximum.reduceat(maps.maps_flat, maps.offsets[:-1]) == 2
    lot_of_failing = lot_of[has_failing]
    _, first, copy_of = np.unique(maps.digests()[has_failing], return_index=True, return_inverse=True)
    joined = (np.ones(len(lot_of_failing)), (lot_of_failing, lot_of_failing[first[copy_of]]))
    graph = coo_matrix(joined, shape=(len(lots), len(lots)))
    return connected_components(graph, directed=False)[1][lot_of].astype(np.int64)


def _deal(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part, 0 to 2, for each unit, from its maps of each class, int64 [U, C].

    The units that have a class, and none that fewer units have, are laid in random order around a circle, each as long
    as it has maps. 70/15/15 of the circle are the parts, from a random point on; a unit goes where its middle lies.
    """
    holders = (table > 0).sum(0)
    rarest = np.where(table > 0, holders, table.shape[0] + 1).argmin(1)
    part = np.empty(len(table), dtype=np.int64)
    for label in np.unique(rarest):
        members = rng.permutation(np.flatnonzero(rarest == label))
        lengths = table[members].sum(1)
        middles = (np.cumsum(lengths) - lengths / 2) / lengths.sum()
        part[members] = np.searchsorted(np.cumsum(SHARES)[:-1], (middles + rng.random()) % 1, side="right")
    return part


def _best_deal(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part for each unit: the first deal with every share near what it should be, or else the best of a few."""
    best, lowest = None, np.inf
    for _ in range(DEALS):
        part, cost = _improve(_deal(table, rng), table, rng)
        if cost < lowest:
            best, lowest = part, cost
        if not any(_is_off(shares) for shares in _shares(table, part)):
            break
    return best


def _improve(part: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Moves and swaps units while that lowers the cost, each time the best of some random pairs; and the cost.

    Each part has an empty unit besides its own, which never leaves it: a swap with that one is a move.
    """
    n_units = len(table)
    counts = np.pad(np.column_stack([table, table.sum(1)]), ((0, 3), (0, 0)))
    part = np.concatenate([part, np.arange(3)])
    held = np.stack([counts[part == p].sum(0) for p in range(3)])
    units_with = (counts > 0).sum(0)
    must_have = np.stack([units_with > 0, units_with > 2, units_with > 1])
    cost = partial(_cost, totals=counts.sum(0), must_have=must_have)
    in_vain = 0
    while in_vain < ROUNDS_IN_VAIN:
        one, other = _pairs(counts[:n_units], lacking=((held == 0) & must_have).any(0), rng=rng)
        one, other = (side[part[one] != part[other]] for side in (one, other))
        here, there, given = part[one], part[other], counts[one] - counts[other]
        before = cost(held[here], here) + cost(held[there], there)
        gain = before - cost(held[here] - given, here) - cost(held[there] + given, there)
        best = gain.argmax()
        if gain[best] < WORTH_A_CHANGE:
            in_vain += 1
            continue
        in_vain = 0
        held[here[best]] -= given[best]
        held[there[best]] += given[best]
        part[one[best]] = there[best]
        if other[best] < n_units:
            part[other[best]] = here[best]
    return part[:n_units], float(cost(held, np.arange(3)).sum())


def _pairs(counts: np.ndarray, *, lacking: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of units to try: moves and swaps at random, and every move of a unit with a class that a part lacks."""
    empty_units = len(counts) + np.arange(3)
    one, other = rng.integers(len(counts), size=(2, PAIRS_A_ROUND))
    other[::2] = rng.choice(empty_units, size=len(other[::2]))
    helpful = np.flatnonzero((counts[:, lacking] > 0).any(1))
    one = np.concatenate([one, np.repeat(helpful, 3)])
    return one, np.concatenate([other, np.tile(empty_units, len(helpful))])


def _cost(held: np.ndarray, part: np.ndarray, *, totals: np.ndarray, must_have: np.ndarray) -> np.ndarray:
    """float64 [M]: what is wrong with parts `part` (int64 [M]) that hold so many maps of each class and of all."""
    share = held / totals
    squared = (share - SHARES[part][:, None]) ** 2
    short = np.where(part == 0, (LEAST_FOR_TRAINING - share[:, -1]).clip(0), 0.0)
    missing = ((held == 0) & must_have[part]).sum(1)
    return (
        squared.sum(1)
        + (WEIGHT_OF_ALL - 1) * squared[:, -1]
        + COST_OF_SMALL_TRAINING * short
        + COST_OF_MISSING[part] * missing
    )


def _notes_on(table: np.ndarray, part: np.ndarray, *, class_counts: np.ndarray) -> tuple[str, ...]:
    """What the split could not do, a sentence each."""
    missing = [name for name, count in zip(CLASS_NAMES, class_counts, strict=True) if count == 0]
    names = [name for name in CLASS_NAMES if name not in missing] + ["all maps"]
    notes = [f"{name}: no map in these data. The class is left out of the answers and the scores." for name in missing]
    counts, shares, off = np.column_stack([table, table.sum(1)]), _shares(table, part), []
    for name, held, share in zip(names, counts.T, shares, strict=True):
        n_lots = int((held > 0).sum())
        lots = "1 lot" if n_lots == 1 else f"{n_lots:,} lots, the largest with {held.max():,}"
        if (share == 0).any():
            lacking = " and ".join(p for p, s in zip(PARTS, share, strict=True) if s == 0)
            notes.append(
                f"{name}: none in {lacking}, since no lot is cut and its {held.sum():,} maps come from {lots}."
            )
        elif _is_off(share):
            off.append(f"{name} {_percent(share)} ({held.sum():,} maps from {lots})")
    if off:
        wanted = f"{_percent(SHARES)} {' / '.join(PARTS)}"
        notes.append(f"Not within {100 * NEAR:.0f} points of {wanted}, since no lot is cut: {'; '.join(off)}.")
    return tuple(notes)


def _shares(table: np.ndarray, part: np.ndarray) -> np.ndarray:
    """float64 [C + 1, 3]: how each class, and last all maps, are shared out among the parts."""
    held = np.stack([table[part == p].sum(0) for p in range(3)], axis=1)
    return np.vstack([held, held.sum(0)]) / np.append(table.sum(0), table.sum())[:, None]


def _is_off(shares: np.ndarray) -> bool:
    return bool((np.abs(shares - SHARES).round(6) > NEAR).any())


def _percent(shares: np.ndarray) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in shares) + "%"


def _fingerprint(maps: WaferMaps, parts: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(maps.maps_flat)
    for array in (maps.shapes, maps.labels, *parts):
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ batches


def resize_maps(maps: WaferMaps, image_size: int) -> torch.Tensor:
    """Resizes all maps into one uint8 tensor [N, 1, image_size, image_size], values 0 no die .. 127 pass .. 254 fail.

    Maps of one size are resized together, as many at a time as stay in the processor's cache.
    """
    out = torch.empty(len(maps), 1, image_size, image_size, dtype=torch.uint8)
    sizes, size_of = np.unique(maps.shapes, axis=0, return_inverse=True)
    by_size = np.split(np.argsort(size_of, kind="stable"), np.cumsum(np.bincount(size_of))[:-1])
    for (rows, columns), members in zip(sizes, by_size, strict=True):
        chunk = max(1, 2**17 // (rows * columns))
        for start in range(0, len(members), chunk):
            some = members[start : start + chunk]
            out[some] = resize_dies(torch.from_numpy(np.stack([maps[i] for i in some])), image_size)
    return out


def resize_dies(dies: torch.Tensor, image_size: int) -> torch.Tensor:
    """uint8 [N, h, w] with values 0 to 2 to uint8 [N, 1, image_size, image_size] with values 0 to 254.

    What `torch.nn.functional.interpolate` does with mode="bilinear" and antialias=True, so that a thin scratch on a
    large map fades into grey rather than vanish between the sampled dies. It is written as one matrix for the rows and
    one for the columns, so that it can be exported for maps of any size, and in whole numbers, which float64 holds
    exactly up to the one division: a grey value halfway between two levels is rounded up wherever this runs.
    """
    rows, columns = (_resize_weights(side, image_size, like=dies) for side in dies.shape[-2:])
    whole = rows.sum(1)[:, None] * columns.sum(1)
    levels = (rows @ dies.unsqueeze(1).double() @ columns.T) * LEVEL_SCALE / whole
    return (levels + 0.5).floor().to(torch.uint8)


def _resize_weights(n_in: int, n_out: int, *, like: torch.Tensor) -> torch.Tensor:
    """Whole numbers in float64 [n_out, n_in], in proportion to the share of each die (column) in each pixel (row).

    A triangle around the pixel's centre, as wide as the pixel and never narrower than a die; lengths are in units of
    1 / (2 n_in n_out) of the map's side.
    """
    device, float64 = like.device, torch.float64
    die_width = torch.scalar_tensor(n_out, dtype=float64, device=device)
    pixel_width = torch.scalar_tensor(n_in, dtype=float64, device=device)
    pixels = (2 * torch.arange(n_out, dtype=float64, device=device) + 1) * pixel_width
    dies = (2 * torch.arange(n_in, dtype=float64, device=device) + 1) * die_width
    return (2 * torch.maximum(pixel_width, die_width) - (pixels[:, None] - dies).abs()).clamp(min=0)


def encode(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1, S, S] with values 0..254 to float32 in -1 (no die) .. 0 (pass) .. 1 (fail)."""
    return images.float().div_(LEVEL_SCALE).sub_(1.0)


def augment(images: torch.Tensor) -> torch.Tensor:
    """One of the eight symmetries of the square for each map, and light die noise; encoded float [N, 1, S, S]."""
    n = len(images)
    flips = torch.rand(3, n, 1, 1, 1, device=images.device) < 0.5
    images = torch.where(flips[0], images.flip(-1), images)
    images = torch.where(flips[1], images.flip(-2), images)
    images = torch.where(flips[2], images.transpose(-1, -2), images)
    swapped = (torch.rand_like(images) < DIE_NOISE) & (images >= 0)  # never where there is no die
    return torch.where(swapped, 1.0 - images, images)


def symmetries(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The eight views of a batch [N, 1, S, S]: four quarter turns, each also mirrored."""
    for turned in (images.rot90(k, (-2, -1)) for k in range(4)):
        yield turned
        yield turned.flip(-1)


class BatchIndexedMaps(Dataset):
    """Maps and labels, indexed by a whole batch at once."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[indices], self.labels[indices]


class EpochBatches(Sampler[torch.Tensor]):
    """Batches of indices, reshuffled each epoch from (seed, epoch), so that a resumed run sees the same batches.

    Args:
        n: number of maps.
        batch_size: maps a batch; when shuffling, a last incomplete batch is left out (batch norm dislikes tiny ones).
        shuffle: a new order each epoch; else in order, every map once.
        seed: of the order.
        sample_weights: float [n] or None; with weights, maps are drawn with replacement in proportion to them.
    """

    def __init__(
        self, n: int, *, batch_size: int, shuffle: bool, seed: int = 0, sample_weights: torch.Tensor | None = None
    ) -> None:
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self.sample_weights = sample_weights
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        drop_last = self.shuffle and self.n >= self.batch_size
        return self.n // self.batch_size if drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            if self.sample_weights is None:
                order = torch.randperm(self.n, generator=generator)
            else:
                order = torch.multinomial(self.sample_weights, self.n, replacement=True, generator=generator)
        else:
            order = torch.arange(self.n)
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


class WaferMapDataModule(pl.LightningDataModule):
    """Serves one split of wafer maps: batches are (float32 [B, 1, S, S] in -1..1, int64 [B]).

    Encoding and augmentation happen after the transfer, on the batch, on the device; augmentation in training only.

    Args:
        maps: all maps.
        split: which of them are for what.
        image_size: side S of the square images.
        batch_size: maps a training batch.
        augmentation: the eight symmetries and light die noise.
        balancing: "sampler" (rare classes drawn more often), "loss" (see `class_weights`) or "none"; both weigh by
            the inverse square root of the class frequency. No map is ever thrown away. The sampler spends less time
            on the many maps without a pattern: on real maps it scored higher at equal training time.
        seed: of the batch order.
    """

    def __init__(
        self,
        maps: WaferMaps,
        split: Split,
        *,
        image_size: int = 40,
        batch_size: int = 32,
        augmentation: bool = True,
        balancing: str = "sampler",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.maps, self.split = maps, split
        self.image_size, self.batch_size = image_size, batch_size
        self.augmentation, self.balancing, self.seed = augmentation, balancing, seed
        images = resize_maps(maps, image_size)
        labels = torch.from_numpy(maps.labels)
        self._parts = {
            name: BatchIndexedMaps(images[torch.from_numpy(part)], labels[torch.from_numpy(part)])
            for name, part in split.parts().items()
        }

    def with_batch_size(self, batch_size: int) -> WaferMapDataModule:
        """The same maps, held in memory once, in training batches of another size."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def images(self, part: str) -> torch.Tensor:
        """The resized maps of a part, uint8 [N, 1, S, S], as `resize_maps` gives them."""
        return self._parts[part].images

    @property
    def class_weights(self) -> list[float] | None:
        """Nine loss weights when balancing by loss: inverse square root frequency, 1 for the average training map."""
        if self.balancing != "loss":
            return None
        counts, weights = self._balance()
        return (weights * counts.sum() / (weights * counts).sum()).tolist()

    def _balance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float [9] each: training maps of each class, and their inverse square roots; 0 where there are none."""
        counts = torch.bincount(self._parts["train"].labels, minlength=NUM_CLASSES).float()
        return counts, torch.where(counts > 0, counts.rsqrt(), 0.0)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        weights = None
        if self.balancing == "sampler":
            weights = self._balance()[1][self._parts["train"].labels]
        return self._loader("train", batch_size=self.batch_size, shuffle=True, sample_weights=weights)

    def val_dataloader(self) -> DataLoader:
        """The validation maps in order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        """The test maps in order."""
        return self._loader("test")

    def _loader(
        self, part: str, *, batch_size: int = 256, shuffle: bool = False, sample_weights: torch.Tensor | None = None
    ) -> DataLoader:
        dataset = self._parts[part]
        batches = EpochBatches(
            len(dataset), batch_size=batch_size, shuffle=shuffle, seed=self.seed, sample_weights=sample_weights
        )
        # A generator of its own: a loader's iterator draws from the global one, at other moments in a resumed run.
        return DataLoader(dataset, sampler=batches, batch_size=None, generator=torch.Generator())

    def on_after_batch_transfer(self, batch: tuple[torch.Tensor, torch.Tensor], dataloader_idx: int):
        """Encodes and, in training, augments a batch on its device."""
        images, labels = batch
        images = encode(images)
        if self.augmentation and self.trainer is not None and self.trainer.training:
            images = augment(images)
        return images, labels

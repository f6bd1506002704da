"""Wafer maps from any source: generated, LSWMD.pkl, .npz files, folders of images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
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
from waferlab.data.maps import CLASS_NAMES, NUM_CLASSES, WaferMaps, pack_maps
from waferlab.data.npz import names_in_npz, read_npz
from waferlab.errors import DataError

SYNTHETIC = "synthetic"

ARRAY_NAMES = ("maps_flat", "offsets", "shapes", "labels", "group", "maps", "arr_0", "arr_1")  # read from an .npz

# Order of the eight label columns in MixedWM38 (J. Wang et al., IEEE Trans. Semicond. Manuf. 33(4), 2020).
MIXEDWM38_COLUMNS = ("Center", "Donut", "Edge-Loc", "Edge-Ring", "Loc", "Near-full", "Scratch", "Random")


def load_wafer_maps(
    data: str | Path = SYNTHETIC,
    *,
    samples_per_class: int = 150,
    max_samples_per_class: int | None = None,
    image_levels: str = "auto",
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
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
        say: prints a line, before a conversion that takes a while.

    Raises:
        DataError: the path does not exist or its content cannot be used.
    """
    if str(data) == SYNTHETIC:
        drawn, labels, lots = generate_wafer_maps(samples_per_class, seed=seed)
        maps = pack_maps(drawn, labels, groups=lots, source=f"synthetic (seed {seed})")
    else:
        maps = _read_path(Path(os.path.expanduser(data)), image_levels=image_levels, say=say)
    if max_samples_per_class is not None:
        maps = _at_most(maps, max_samples_per_class, seed=seed)
    return maps


def get_tutorial_dataset(max_samples_per_class: int = 50, *, seed: int = 0) -> WaferMaps:
    """Generated maps for a first try, so many of each of the nine classes; `split_by_lot` makes three parts of them.

    Raises:
        ValueError: less than one map of each class.
    """
    return load_wafer_maps(samples_per_class=max_samples_per_class, seed=seed)


def _read_path(path: Path, *, image_levels: str, say: Callable[[str], None]) -> WaferMaps:
    if not path.exists():
        raise DataError(f"--data {path}: no such file or folder. Give {SYNTHETIC!r}, a .npz, LSWMD.pkl or a folder.")
    if path.is_dir():
        return _read_image_folder(path, levels=image_levels)
    check_is_a_file(path)
    if path.suffix == ".pkl":
        from waferlab.data.lswmd import convert_lswmd

        try:
            return _read_npz(convert_lswmd(path, say=say))
        except DataError:
            raise
        except (ValueError, OSError) as error:
            raise DataError(str(error)) from error
    if path.suffix == ".npz":
        return _read_npz(path)
    raise DataError(
        f"--data {path}: unknown kind of file {path.suffix!r}. Give a .npz, LSWMD.pkl or a folder of images."
    )


def check_is_a_file(path: Path) -> None:
    """Raises DataError if it is something that may never end, such as a pipe."""
    if not path.is_file():
        raise DataError(f"{path}: is no plain file. Write what comes out of it to a file first.")


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
    groups, notes = np.arange(len(labels)), ("No group in the file: each map is a lot of its own.",)
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
        offsets=whole_numbers(arrays["offsets"], name="offsets", source=path.name),
        shapes=whole_numbers(arrays["shapes"], name="shapes", source=path.name),
        labels=labels,
        groups=groups,
        source=path.name,
        notes=notes,
    )


def whole_numbers(values: np.ndarray, *, name: str, source: str) -> np.ndarray:
    """The values as int64; raises DataError if they are of another kind."""
    if values.dtype.kind not in "iu":
        raise DataError(f"{source}: {name} are {values.dtype}, not whole numbers. Save them with .astype('int64').")
    return values.astype(np.int64)


def _lot_numbers(lots: np.ndarray, *, n: int, source: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Lots named by text or number, one a map, to int64 numbers and a note on maps whose lot is unknown.

    Whole numbers from 0 on stay what they are; other names are numbered in their order. A map whose lot is empty or NaN
    is a lot of its own, with a number below 0.
    """
    if lots.shape != (n,) or lots.dtype.kind not in "biufSU":
        raise DataError(
            f"{source}: group is {lots.dtype} {lots.shape}. Expected a number or a text for each of {n} maps."
        )
    is_text = lots.dtype.kind in "SU"
    known = np.char.strip(lots) != lots.dtype.type() if is_text else lots == lots  # NaN is not itself
    names = lots[known]
    if is_text or not _fit_int64(names) or (names < 0).any():
        names = np.unique(names, return_inverse=True)[1]
    numbers = np.empty(n, dtype=np.int64)
    numbers[known] = names
    unknown = int(n - known.sum())
    numbers[~known] = -1 - np.arange(unknown)
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
        raise DataError(f"{source}: unknown label {unknown[0]!r:.80}. Allowed: {', '.join(CLASS_NAMES)}.")
    order = np.argsort(names)
    return order[np.searchsorted(names[order], labels)].astype(np.int64)


def _read_image_folder(folder: Path, *, levels: str) -> WaferMaps:
    """One sub-folder for each class, named like the class; each image is one map, a pixel a die."""
    files, labels = [], []
    sub_folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not sub_folders:
        raise DataError(f"{folder}: no class folders in it. Expected sub-folders named {', '.join(CLASS_NAMES)}.")
    for sub in sub_folders:
        name = class_of_folder(sub.name)
        if name is None:
            raise DataError(f"{folder}: unknown class folder {sub.name!r}. Allowed: {', '.join(CLASS_NAMES)}.")
        found = images_in(sub)
        files += found
        labels += [CLASS_NAMES.index(name)] * len(found)
    if not files:
        raise DataError(f"{folder}: no images in the class folders. Supported: {', '.join(sorted(IMAGE_SUFFIXES))}.")
    levels = choose_levels(files, levels)
    note = f"Images read as {levels_in_words(levels)}. Lots are not known: each image is its own."
    return pack_maps([read_image(p, levels) for p in files], np.array(labels), source=folder.name, notes=(note,))


def _at_most(maps: WaferMaps, limit: int, *, seed: int) -> WaferMaps:
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(maps.labels == c))[:limit] for c in range(NUM_CLASSES)]
    indices = np.sort(np.concatenate(kept))
    if len(indices) == len(maps):
        return maps
    return maps.select(indices, note=f"At most {limit} maps a class: {len(indices):,} of {len(maps):,} kept.")

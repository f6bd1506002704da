"""Wafer maps from any source, split without leaks, and served to Lightning in batches.

A wafer map is a small uint8 image of dies: 0 no die, 1 pass, 2 fail. Sizes differ from product to product, so a set
of maps is kept flat (`WaferMaps`) and resized once into one uint8 tensor. After that a batch is a single indexing
operation; encoding and augmentation run on the whole batch, on whatever device it was sent to. There are no worker
processes: with maps this small, starting them costs more than they give.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from wafer_generator import CLASS_NAMES, generate_wafer_maps

SYNTHETIC = "synthetic"
NUM_CLASSES = len(CLASS_NAMES)
IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"}
IMAGE_LEVELS = ("auto", "three", "binary")
MAX_MAP_SIDE = 1024  # dies; the largest map of WM-811K has 212
LEVEL_SCALE = 127  # resized maps keep grey values between the levels: 0 no die, 127 pass, 254 fail
DIE_NOISE = 0.01  # share of pixels whose pass and fail are swapped during augmentation

# Order of the eight label columns in MixedWM38 (J. Wang et al., IEEE Trans. Semicond. Manuf. 33(4), 2020).
MIXEDWM38_COLUMNS = ("Center", "Donut", "Edge-Loc", "Edge-Ring", "Loc", "Near-full", "Scratch", "Random")


class DataError(ValueError):
    """The given data cannot be used; the message names the value, the reason and the remedy."""


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

    def digests(self) -> list[bytes]:
        """A 16-byte digest of each map's size and dies; equal maps have equal digests."""
        return [
            hashlib.blake2b(self[i].tobytes(), digest_size=16, key=self.shapes[i].astype("<i8").tobytes()).digest()
            for i in range(len(self))
        ]

    def select(self, indices: np.ndarray, *, note: str = "") -> WaferMaps:
        """The maps at `indices` (int64 [M]), in that order."""
        return pack_maps(
            [self[i] for i in indices],
            self.labels[indices],
            groups=self.groups[indices],
            source=self.source,
            notes=(*self.notes, note) if note else self.notes,
        )


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
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds on a damaged or pickled file
        raise DataError(f"{path}: cannot be read as an .npz without pickles. Save it with numpy.savez.") from error
    if {"arr_0", "arr_1"} <= arrays.keys():
        return _from_mixedwm38(arrays["arr_0"], arrays["arr_1"], source=path.name)
    if "labels" not in arrays or not ({"maps", "maps_flat"} & arrays.keys()):
        raise DataError(
            f"{path}: holds {sorted(arrays)}. Expected maps_flat, offsets, shapes, labels; or maps [N,H,W] and labels."
        )
    labels = _label_indices(arrays["labels"], source=path.name)
    groups = arrays.get("group", np.arange(len(labels))).astype(np.int64)
    if "maps" in arrays:
        return _from_dense(arrays["maps"], labels, groups, source=path.name)
    missing = {"offsets", "shapes"} - arrays.keys()
    if missing:
        raise DataError(
            f"{path}: {sorted(missing)} missing beside maps_flat. Expected maps_flat, offsets, shapes, labels."
        )
    return WaferMaps(
        maps_flat=arrays["maps_flat"],
        offsets=arrays["offsets"].astype(np.int64),
        shapes=arrays["shapes"].astype(np.int64),
        labels=labels,
        groups=groups,
        source=path.name,
    )


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
    patterns = (columns != 0).sum(1)
    odd = (maps.reshape(len(maps), -1) > 2).any(1)  # the published file holds a few dies of value 3
    keep = (patterns <= 1) & ~odd
    names = np.where(patterns == 0, "none", np.array(MIXEDWM38_COLUMNS)[columns.argmax(1)])[keep]
    note = (
        f"MixedWM38: {int((patterns[keep] == 1).sum()):,} single-pattern and {int((patterns[keep] == 0).sum()):,} "
        f"defect-free maps kept; left out: {int((patterns > 1).sum()):,} mixed, "
        f"{int((odd & (patterns <= 1)).sum()):,} with die values above 2. Lots are not in this file."
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
    labels = labels.astype(str)
    unknown = sorted(set(labels.tolist()) - set(CLASS_NAMES))
    if unknown:
        raise DataError(f"{source}: unknown label {unknown[0]!r}. Allowed: {', '.join(CLASS_NAMES)}.")
    order = np.argsort(CLASS_NAMES)
    return order[np.searchsorted(np.array(CLASS_NAMES)[order], labels)].astype(np.int64)


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


@dataclass(frozen=True, eq=False)
class Split:
    """Indices (int64, sorted) of the three parts, and a fingerprint that changes with any map or assignment."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    fingerprint: str

    def parts(self) -> dict[str, np.ndarray]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def split_by_lot(
    maps: WaferMaps, *, validation_fraction: float = 0.15, test_fraction: float = 0.15, seed: int = 0
) -> Split:
    """Splits so that no lot, and no exact copy of a map, is in two parts; stratified by class.

    Lots that share an exact copy of a map are kept together, then scikit-learn's `StratifiedGroupKFold` deals them
    out. A deal that leaves a class out of a part is dealt again with the next seed.

    Raises:
        DataError: a class has no maps, or its maps come from too few lots for three parts.
    """
    digests = maps.digests()
    units = _lots_joined_by_copies(maps.groups, digests)
    for label, name in enumerate(CLASS_NAMES):
        lots = len(np.unique(units[maps.labels == label]))
        if lots < 3:
            raise DataError(
                f"{maps.source}: class {name!r} has {int(maps.class_counts[label])} maps from {lots} lot(s); training, "
                "validation and test need one lot each at the least. Add maps of this class from other lots."
            )
    everything = np.arange(len(maps))
    for attempt in range(20):
        rest, test = _deal(everything, maps.labels, units, fraction=test_fraction, seed=seed + 1000 * attempt)
        fraction = validation_fraction / (1 - test_fraction)
        train, validation = _deal(rest, maps.labels, units, fraction=fraction, seed=seed + 1000 * attempt)
        if all(len(np.unique(maps.labels[part])) == NUM_CLASSES for part in (train, validation, test)):
            return Split(train, validation, test, _fingerprint(digests, maps.labels, (train, validation, test)))
    raise DataError(
        f"{maps.source}: in 20 tries no split had all nine classes in every part; the rarest class has "
        f"{int(maps.class_counts.min())} maps. Add lots with the rare classes."
    )


def _lots_joined_by_copies(groups: np.ndarray, digests: list[bytes]) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    lots, lot_of = np.unique(groups, return_inverse=True)
    first_lot: dict[bytes, int] = {}
    joined_to = np.array([first_lot.setdefault(d, lot) for d, lot in zip(digests, lot_of, strict=True)])
    graph = coo_matrix((np.ones(len(lot_of)), (lot_of, joined_to)), shape=(len(lots), len(lots)))
    return connected_components(graph, directed=False)[1][lot_of]


def _deal(
    indices: np.ndarray, labels: np.ndarray, units: np.ndarray, *, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits `indices` into (rest, part), the part holding about `fraction` of them: more where lots are few."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    pairs = np.unique(np.stack([labels[indices], units[indices]], 1), axis=0)
    fewest_lots = int(np.bincount(pairs[:, 0], minlength=NUM_CLASSES).min())
    # With fewer lots of a class than folds, some folds would lack that class: then fewer, larger folds.
    n_splits = min(max(2, round(1 / fraction)), max(2, fewest_lots))
    one_map_a_lot = len(np.unique(units[indices])) == len(indices)
    splitter = StratifiedKFold if one_map_a_lot else StratifiedGroupKFold  # the plain one is far faster
    folds = splitter(n_splits=n_splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rare class may have fewer maps than folds: checked after
        deals = folds.split(indices, labels[indices], units[indices])
        rest, part = max(deals, key=lambda deal: len(np.unique(labels[indices[deal[1]]])))
    return indices[rest], indices[part]


def _fingerprint(digests: list[bytes], labels: np.ndarray, parts: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(b"".join(digests) + labels.astype("<i8").tobytes())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ batches


def resize_maps(maps: WaferMaps, image_size: int) -> torch.Tensor:
    """Resizes all maps into one uint8 tensor [N, 1, image_size, image_size], values 0 no die .. 127 pass .. 254 fail.

    Bilinear with antialiasing, so that a thin scratch on a large map fades into grey rather than vanish between the
    sampled dies. Maps of one size are resized together.
    """
    out = torch.empty(len(maps), 1, image_size, image_size, dtype=torch.uint8)
    sizes, size_of = np.unique(maps.shapes, axis=0, return_inverse=True)
    by_size = np.split(np.argsort(size_of, kind="stable"), np.cumsum(np.bincount(size_of))[:-1])
    for (rows, columns), members in zip(sizes, by_size, strict=True):
        chunk = max(1, 2**24 // (rows * columns))  # 64 MB of float32 at a time
        for start in range(0, len(members), chunk):
            some = members[start : start + chunk]
            levels = torch.from_numpy(np.stack([maps[i] for i in some])).unsqueeze(1).float() * LEVEL_SCALE
            out[some] = resize_levels(levels, image_size).round_().to(torch.uint8)
    return out


def resize_levels(levels: torch.Tensor, image_size: int) -> torch.Tensor:
    """Float [N, 1, h, w] to float [N, 1, image_size, image_size], values kept within their range.

    What `torch.nn.functional.interpolate` does with mode="bilinear" and antialias=True, written as one matrix for the
    rows and one for the columns: so it can be exported for maps of any size.
    """
    rows = _resize_matrix(levels.shape[-2], image_size, levels)
    columns = _resize_matrix(levels.shape[-1], image_size, levels)
    return rows @ levels @ columns.T


def _resize_matrix(n_in: int, n_out: int, like: torch.Tensor) -> torch.Tensor:
    """Float [n_out, n_in]: a triangle around each output pixel, as wide as the pixel and never narrower than a die."""
    scale = torch.scalar_tensor(n_in, dtype=like.dtype, device=like.device) / n_out
    centres = (torch.arange(n_out, dtype=like.dtype, device=like.device) + 0.5) * scale
    dies = torch.arange(n_in, dtype=like.dtype, device=like.device) + 0.5
    weights = (1 - (centres[:, None] - dies).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


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
        counts = torch.bincount(self._parts["train"].labels, minlength=NUM_CLASSES).float()
        weights = counts.rsqrt()
        return (weights * counts.sum() / (weights * counts).sum()).tolist()

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        labels = self._parts["train"].labels
        weights = None
        if self.balancing == "sampler":
            weights = torch.bincount(labels, minlength=NUM_CLASSES).float().rsqrt()[labels]
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

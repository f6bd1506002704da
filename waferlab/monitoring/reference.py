"""What is kept of the validation part beside a model, so that later batches can be compared with it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from waferlab.data.maps import CLASS_NAMES, NUM_CLASSES, WaferMaps
from waferlab.data.npz import read_npz
from waferlab.data.splitting import Split
from waferlab.errors import ModelError
from waferlab.monitoring.class_mix import Calibration, fit_calibration
from waferlab.tracking.whole_files import write_atomically

if TYPE_CHECKING:
    from waferlab.deployment.predictor import Predictor

REFERENCE_FILE = "reference.npz"  # beside model.onnx, or in extra_files/ of a registered version
MOST_MAPS = 4000  # that a reference keeps
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / 1.618...: products with whole numbers spread evenly (Knuth, TAOCP 6.4)
NO_LABEL = -1  # a validation map of a class that the model does not answer


@dataclass(frozen=True, eq=False)
class Sample:
    """What is compared of N maps.

    Attributes:
        probabilities: float32 [N, C], the model's answers.
        features: float16 [N, F], what its last layer makes them of; rounded on both sides of a comparison alike.
        lots: int64 [N], the lot of each map.
        density: float32 [N] in 0..1, failing dies among those that are there.
        grids: int16 [N, 2], rows and columns of each map.
        weights: float32 [N], how many maps each stands for: where a lot was thinned, more than itself. None is 1 each.
    """

    probabilities: np.ndarray
    features: np.ndarray
    lots: np.ndarray
    density: np.ndarray
    grids: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            object.__setattr__(self, "weights", np.ones(len(self.lots), dtype=np.float32))

    @classmethod
    def of(cls, predictor: Predictor, maps: Sequence[np.ndarray], lots: np.ndarray) -> Sample:
        """Of raw die maps, each uint8 [rows, columns], and the lot of each, int64 [N].

        Raises:
            ValueError: a map is none, or the model's file does not say where its features are.
        """
        probabilities, features = predictor.outputs(maps)
        dies = np.array([np.count_nonzero(one) for one in maps])
        failing = np.array([np.count_nonzero(one == 2) for one in maps])
        return cls(
            probabilities=probabilities,
            features=np.clip(features, -6e4, 6e4).astype(np.float16),
            lots=np.asarray(lots, dtype=np.int64),
            density=(failing / np.maximum(dies, 1)).astype(np.float32),
            grids=np.array([one.shape for one in maps], dtype=np.int16).reshape(-1, 2),
        )

    @classmethod
    def joined(cls, samples: Sequence[Sample]) -> Sample:
        """One sample of several."""
        return cls(*(np.concatenate([getattr(one, field.name) for one in samples]) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.lots)

    @property
    def n_lots(self) -> int:
        """Number of lots that the maps come from."""
        return len(np.unique(self.lots))

    def select(self, indices: np.ndarray) -> Sample:
        """The maps at `indices` (int64 [M] in that order, or bool [N])."""
        return Sample(*(getattr(self, field.name)[indices] for field in fields(self)))

    def standing_for(self, lots: np.ndarray) -> Sample:
        """With weights, where this is what is left of maps of these lots, int64 [N]."""
        names, sizes = np.unique(lots, return_counts=True)
        place = np.searchsorted(names, self.lots)
        shares = sizes / np.maximum(np.bincount(place, minlength=len(names)), 1)
        return replace(self, weights=shares[place].astype(np.float32))

    def median_density(self) -> float:
        """Of all maps that these stand for."""
        return float(np.quantile(self.density, 0.5, weights=self.weights, method="inverted_cdf"))


@dataclass(frozen=True, eq=False)
class Reference:
    """The validation part as a model sees it.

    Attributes:
        sample: of the validation maps; at most `MOST_MAPS`, of all lots.
        labels: int64 [N], the true class of each, a column of the probabilities; `NO_LABEL` if it has none.
        class_names: C names, in the order of the columns.
        training_counts: int64 [C], training maps of each class.
    """

    sample: Sample
    labels: np.ndarray
    class_names: tuple[str, ...]
    training_counts: np.ndarray

    @classmethod
    def of(cls, predictor: Predictor, maps: WaferMaps, split: Split, *, seed: int = 0) -> Reference:
        """Of the validation part of a split.

        Where it has more than `MOST_MAPS` maps, large lots are thinned at random (by `seed`), and no lot is given up
        while that suffices: lots are what later batches are compared by.
        """
        lots, keys = maps.groups[split.validation], np.random.default_rng(seed).random(len(split.validation))
        kept = split.validation[at_most(lots, MOST_MAPS, keys)]
        columns = np.full(NUM_CLASSES, NO_LABEL)
        for column, name in enumerate(predictor.class_names):
            columns[CLASS_NAMES.index(name)] = column
        trained = columns[maps.labels[split.train]]
        return cls(
            sample=Sample.of(predictor, [maps[i] for i in kept], maps.groups[kept]).standing_for(lots),
            labels=columns[maps.labels[kept]],
            class_names=tuple(predictor.class_names),
            training_counts=np.bincount(trained[trained >= 0], minlength=len(predictor.class_names)),
        )

    @cached_property
    def calibration(self) -> Calibration:
        """How its answers become probabilities that are right on its own maps."""
        known = self.labels != NO_LABEL
        return fit_calibration(self.sample.probabilities[known], self.labels[known])

    @cached_property
    def shares(self) -> np.ndarray:
        """float64 [C], of the true classes in the whole validation part."""
        known = self.labels != NO_LABEL
        counts = np.bincount(self.labels[known], self.sample.weights[known], minlength=len(self.class_names))
        return counts / counts.sum()

    def save(self, path: Path) -> Path:
        """Writes an .npz without pickles, whole or not at all."""
        arrays = {field.name: getattr(self.sample, field.name) for field in fields(Sample)}
        content = io.BytesIO()
        np.savez_compressed(
            content, **arrays, labels=self.labels, class_names=np.array(self.class_names),
            training_counts=self.training_counts,
        )  # fmt: skip
        return write_atomically(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Reference:
        """What `save` wrote.

        Raises:
            ModelError: there is no such file, or it is damaged.
        """
        if not path.is_file():
            raise ModelError(f"{path}: no such file. Training leaves it beside model.onnx: train the model anew.")
        names = [*(field.name for field in fields(Sample)), "labels", "class_names", "training_counts"]
        try:
            arrays = read_npz(path, names)
            if missing := [name for name in names if name not in arrays and name != "weights"]:  # which are new
                raise ValueError(f"{path}: {', '.join(missing)} missing")
            reference = cls(
                sample=Sample(*(arrays.get(field.name) for field in fields(Sample))),
                labels=arrays["labels"],
                class_names=tuple(arrays["class_names"].tolist()),
                training_counts=arrays["training_counts"],
            )
            reference._check()
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{path} is no reference of a validation part ({error}). Copy it again from beside the model that it "
                "belongs to, or train the model anew."
            ) from error
        return reference

    @classmethod
    def beside(cls, predictor: Predictor) -> Reference:
        """The one that is kept with a model.

        Raises:
            ModelError: there is none, it is damaged, it is another model's, or this one does not give its features.
        """
        places = [predictor.folder / "extra_files" / REFERENCE_FILE, predictor.folder / REFERENCE_FILE]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ModelError(
                f"{predictor.name} has no {REFERENCE_FILE}, so there is nothing to compare a batch with. Models keep "
                "one since monitoring exists: train anew, or give a model that has it."
            )
        reference = cls.load(found)
        if reference.class_names != tuple(predictor.class_names):
            raise ModelError(
                f"{found} is about the classes {', '.join(reference.class_names)}, {predictor.name} answers "
                f"{', '.join(predictor.class_names)}. Give the model its own {REFERENCE_FILE}."
            )
        try:
            _, features = predictor.outputs([np.ones((3, 3), np.uint8)])
        except ValueError as error:
            raise ModelError(str(error)) from error
        widths = features.shape[1], reference.sample.features.shape[1]
        if widths[0] != widths[1]:
            raise ModelError(
                f"{found} holds {widths[1]} features of each map, {predictor.name} gives {widths[0]}: it is another "
                "model's. Export the model anew."
            )
        return reference

    def _check(self) -> None:
        """Raises ValueError unless the arrays fit each other and are what they should be."""
        sample, n, c = self.sample, len(self.labels), len(self.class_names)
        wanted = {
            "probabilities": ("f", (n, c)), "features": ("f", (n, *sample.features.shape[1:2])), "lots": ("i", (n,)),
            "density": ("f", (n,)), "grids": ("i", (n, 2)), "weights": ("f", (n,)),
        }  # fmt: skip
        held = {name: (getattr(sample, name).dtype.kind, getattr(sample, name).shape) for name in wanted}
        wanted |= {"labels": ("i", (n,)), "training_counts": ("i", (c,))}
        held |= {
            name: (getattr(self, name).dtype.kind, getattr(self, name).shape) for name in wanted if name not in held
        }
        if wrong := [name for name in wanted if held[name] != wanted[name]]:
            raise ValueError(f"{wrong[0]} are {held[wrong[0]]}, wanted {wanted[wrong[0]]}")
        if n == 0 or sample.features.ndim != 2 or not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("it holds no maps, features or class names")
        numbers = (sample.probabilities, sample.features, sample.density, sample.weights)
        if not all(np.isfinite(some).all() for some in numbers) or not (sample.probabilities >= 0).all():
            raise ValueError("a number in it is none")
        if not (sample.weights > 0).all():
            raise ValueError("a map in it stands for none")
        if not ((self.labels >= NO_LABEL) & (self.labels < c)).all() or (self.labels == NO_LABEL).all():
            raise ValueError("its labels are not those of its classes")


def place_in_lot(lots: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int64 [N], each map's place within its lot, from 0, by random `keys`, float64 [N]; `lots` int64 [N]."""
    order = np.lexsort((keys, lots))
    _, first, sizes = np.unique(lots[order], return_index=True, return_counts=True)
    place = np.empty(len(lots), dtype=np.int64)
    place[order] = np.arange(len(lots)) - np.repeat(first, sizes)
    return place


def at_most(lots: np.ndarray, limit: int, keys: np.ndarray) -> np.ndarray:
    """int64 [M], sorted, at most so many maps: of all lots while there are no more of these, of each up to as many.

    Which maps of a lot the `keys` say, float64 [N], drawn at random once; which lots, where there are more of them,
    their numbers. So of maps that come one after the other, none that was given up is wanted again.
    """
    place = place_in_lot(lots, keys)
    a_lot = int((np.cumsum(np.bincount(place)) <= limit).sum())
    if a_lot > 0:
        return np.flatnonzero(place < a_lot)
    first = np.flatnonzero(place == 0)  # more lots than maps are allowed: some of the lots, evenly over their numbers
    return np.sort(first[np.argsort(lots[first].astype(np.uint64) * GOLDEN, kind="stable")[:limit]])

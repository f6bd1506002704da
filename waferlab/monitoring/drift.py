"""Whether a batch is like the validation part: six questions, and one verdict whose false alarms are bounded.

The questions, and the distance of each::

    scores      KS distance of each class's probabilities, the least usual one (Lipton, Wang & Smola 2018, arXiv
                1802.03916; Rabanser, Guennemann & Lipton 2019, "Failing loudly", arXiv 1810.11953)
    features    MMD with a Gaussian kernel as wide as the median distance (Gretton et al. 2012, JMLR 13), by random
                Fourier features (Rahimi & Recht 2007)
    class mix   total variation distance of the mean answers, after the first step of `class_mix.estimate_mix` from the
                shares in both together
    density     KS distance of the share of failing dies
    die grids   total variation distance of the shares of die grids
    new grids   share of the batch on die grids that the validation part had (almost) nothing of

Maps of a lot are alike, so a test that takes maps for independent alarms at nearly every batch. Here lots are what is
exchanged: each lot has the same weight, shared out among its maps, and a distance is compared with the distances after
dealing the same lots anew to batch and reference (Phipson & Smyth 2010: p = (1 + as far or further) / (1 + deals)). If
the batch's lots are like validation lots, each p value is below a with a probability of a at the most, however few lots
there are. A lot of 2 maps tells less than one of 25, so the lots of both sides are first thinned to the same sizes.
The probability of any false alarm is bounded by 5% over all questions by the smallest p value of each deal (Westfall &
Young 1993, "Resampling-based multiple testing": step-down minP). It corrects as Holm's method does, but the deals also
say how the questions hang together, and those here mostly ask after the same change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from waferlab.evaluation.statistics import SIGNIFICANCE
from waferlab.monitoring.class_mix import estimate_mix
from waferlab.monitoring.reference import Reference, Sample, place_in_lot

PERMUTATIONS = 1999
LEAST_LOTS = 5  # on either side, for a verdict
ALARM, NO_ALARM, NO_VERDICT = "alarm", "no alarm", "no verdict"
GRID_POINTS = 100  # at which distribution functions are compared
FREQUENCIES = 256
MAPS_FOR_MEDIAN = 300
HARDLY = 0.001  # a share of the validation part below which it had hardly any maps of a die grid
SIGNALS = {
    "scores": "Answers",
    "features": "Features",
    "class_mix": "Class mix",
    "density": "Fail density",
    "grids": "Die grids",
    "new_grids": "New die grids",
}


@dataclass(frozen=True)
class Signal:
    """One question and its answer.

    Attributes:
        key: of `SIGNALS`.
        effect: the distance of the batch from the reference, 0..1 but for features.
        usual: what 95 of 100 deals of the same lots stay below; None without a test, as p values.
        p: of the lot permutation test.
        p_corrected: for the number of signals.
    """

    key: str
    effect: float
    usual: float | None = None
    p: float | None = None
    p_corrected: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        return SIGNALS[self.key]

    @property
    def alarms(self) -> bool:
        """Whether it is further from the reference than chance explains."""
        return self.p_corrected is not None and self.p_corrected < SIGNIFICANCE


@dataclass(frozen=True)
class Drift:
    """A batch compared with the validation part.

    Attributes:
        verdict: `ALARM`, `NO_ALARM` or `NO_VERDICT`.
        signals: one for each of `SIGNALS`.
        columns: of each class, as signals named like the class, the distance of its probabilities.
        lots, reference_lots: how many were compared.
        caveats: what limits the verdict, in sentences.
        odd_lots: (lot, distance, share of reference lots that are nearer), the furthest of the batch first.
    """

    verdict: str
    signals: tuple[Signal, ...]
    columns: tuple[Signal, ...]
    lots: int
    reference_lots: int
    caveats: tuple[str, ...]
    odd_lots: tuple[tuple[int, float, float], ...]

    def signal(self, key: str) -> Signal:
        """One of them."""
        return next(one for one in self.signals if one.key == key)


def compare(reference: Reference, batch: Sample, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Drift:
    """Tests a batch against the validation part.

    Args:
        reference: of the model that answered the batch.
        batch: two maps or more.
        permutations: deals of the lots beside the real one; p values are at least 1 / (1 + permutations).
        seed: of the deals, of the thinning of lots and of the features' kernel.

    Raises:
        ValueError: the batch's answers have other columns than the reference.
    """
    ours, theirs = reference.sample, batch
    for what in ("probabilities", "features"):
        widths = [getattr(side, what).shape[1] for side in (ours, theirs)]
        if widths[0] != widths[1]:
            raise ValueError(f"{what} of {widths[1]} columns against {widths[0]} of the reference: another model's.")
    rng = np.random.default_rng(seed)
    pooled, lots = _side_by_side(*_of_equal_sizes(batch, reference.sample, rng))
    n_batch, n_reference = batch.n_lots, reference.sample.n_lots
    tables = _tables(pooled, lots, reference, rng)
    enough = min(n_batch, n_reference) >= LEAST_LOTS
    deals = _deal(n_batch, n_reference, permutations if enough else 0, rng)
    found = {key: _distances(key, table, deals) for key, table in tables.items()}
    columns, signals = _answered(found, reference.class_names)
    verdict = (ALARM if any(one.alarms for one in signals) else NO_ALARM) if enough else NO_VERDICT
    return Drift(
        verdict, signals, columns, n_batch, n_reference, tuple(_caveats(batch, reference.sample)),
        _odd_lots(tables["features"], np.unique(batch.lots)),
    )  # fmt: skip


# The lots of both sides, the batch's first


def _of_equal_sizes(batch: Sample, reference: Sample, rng: np.random.Generator) -> tuple[Sample, Sample]:
    """Both, with large lots thinned at random so that lots of one side are not larger than those of the other."""
    sizes = [np.unique(side.lots, return_counts=True)[1] for side in (batch, reference)]
    thinned = []
    for side, own, other in ((batch, *sizes), (reference, *sizes[::-1])):
        # A lot keeps as many maps as the lot of the other side has that is as large among its own.
        place = (np.argsort(np.argsort(own, kind="stable")) + 0.5) / len(own)
        allowed = np.ceil(np.quantile(other, place)).astype(int)
        _, lot = np.unique(side.lots, return_inverse=True)
        thinned.append(side.select(np.flatnonzero(place_in_lot(side.lots, rng.random(len(side))) < allowed[lot])))
    return thinned[0], thinned[1]


def _side_by_side(batch: Sample, reference: Sample) -> tuple[Sample, np.ndarray]:
    """All maps, sorted by lot, and the lot of each, int64 [N], from 0; lots of the batch before all others."""
    _, first = np.unique(batch.lots, return_inverse=True)
    _, second = np.unique(reference.lots, return_inverse=True)
    lots = np.concatenate([first, second + first.max() + 1])
    order = np.argsort(lots, kind="stable")
    return Sample.joined([batch, reference]).select(order), lots[order]


def _deal(n_batch: int, n_reference: int, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [1 + permutations, lots], 1 where a lot goes to the batch; the real deal comes first."""
    n = n_batch + n_reference
    deals = np.zeros((1 + permutations, n), dtype=np.float32)
    deals[0, :n_batch] = 1
    if permutations:
        drawn = np.argpartition(rng.random((permutations, n), dtype=np.float32), n_batch - 1, axis=1)[:, :n_batch]
        np.put_along_axis(deals[1:], drawn, 1, axis=1)
    return deals


# Each question as a table with a row a lot, whose means over the lots of either side are compared


def _tables(pooled: Sample, lots: np.ndarray, reference: Reference, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """float32 [lots, D] by signal, the mean over the maps of each lot; scores [lots, C, D]."""
    likelihoods = reference.calibration.likelihoods(pooled.probabilities)
    weight = 1 / np.bincount(lots)[lots]
    together = likelihoods * estimate_mix(likelihoods, weight[:, None])
    _, grid = np.unique(pooled.grids, axis=0, return_inverse=True)
    one_grid = _means(np.eye(grid.max() + 1, dtype=np.float32)[grid.ravel()], lots)
    return {
        "scores": np.stack([_distribution(column, lots) for column in pooled.probabilities.T], axis=1),
        "features": _means(_random_features(pooled.features, rng), lots),
        "class_mix": _means(together / np.maximum(together.sum(1, keepdims=True), 1e-300), lots),
        "density": _distribution(pooled.density, lots),
        "grids": one_grid,
        "new_grids": one_grid,
    }


def _means(values: np.ndarray, lots: np.ndarray) -> np.ndarray:
    """float32 [lots, D], from values [N, D] of maps sorted by lot."""
    sizes = np.bincount(lots)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return (np.add.reduceat(values, first, axis=0) / sizes[:, None]).astype(np.float32)


def _distribution(values: np.ndarray, lots: np.ndarray) -> np.ndarray:
    """float32 [lots, D], the share of each lot's maps up to each of D quantiles of all values, float [N]."""
    points = np.unique(np.quantile(values, np.linspace(0, 1, GRID_POINTS + 1)[:-1], method="lower"))
    below = np.searchsorted(points, values, side="left")  # the first of the points that is not less
    n_lots, wide = int(lots[-1]) + 1, len(points) + 1
    counts = np.bincount(lots * wide + below, minlength=n_lots * wide).reshape(n_lots, wide)
    shares = np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)
    table = np.ones((n_lots, GRID_POINTS), dtype=np.float32)  # past the last point all lots are alike
    table[:, : len(points)] = shares[:, :-1]
    return table


def _random_features(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [N, 2 * FREQUENCIES], whose inner products are about a Gaussian kernel's of the features, [N, F]."""
    from scipy.spatial.distance import pdist

    values = features.astype(np.float32)
    some = values[rng.permutation(len(values))[:MAPS_FOR_MEDIAN]]
    width = float(np.median(pdist(some))) if len(some) > 1 else 0.0
    frequencies = rng.standard_normal((values.shape[1], FREQUENCIES), dtype=np.float32) / (width or 1.0)
    angles = values @ frequencies
    return np.hstack([np.cos(angles), np.sin(angles)]) / math.sqrt(FREQUENCIES)


def _distances(key: str, table: np.ndarray, deals: np.ndarray) -> np.ndarray:
    """float64 [deals, 1], or [deals, C] for scores: how far the lots of the batch are from the others in each deal."""
    flat = table.reshape(len(table), -1)
    n_batch = deals[0].sum()
    inside = deals @ flat
    batch, rest = inside / n_batch, (flat.sum(axis=0) - inside) / (len(flat) - n_batch)
    match key:
        case "scores":
            return np.abs(batch - rest).reshape(len(deals), *table.shape[1:]).max(axis=2).astype(np.float64)
        case "features":
            return np.sqrt(((batch - rest).astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        case "density":
            return np.abs(batch - rest).max(axis=1, keepdims=True).astype(np.float64)
        case "new_grids":
            return (batch * (rest < HARDLY)).sum(axis=1, keepdims=True, dtype=np.float64)
        case _:
            return np.abs(batch - rest).sum(axis=1, keepdims=True, dtype=np.float64) / 2


# From distances to a verdict


def _answered(
    found: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> tuple[tuple[Signal, ...], tuple[Signal, ...]]:
    """The signals of the classes' probabilities, and of all questions, from the distances in each deal."""
    columns = _signals(class_names, found["scores"])
    # All columns are one question: how small the smallest p value is.
    p = _p_of_deals(found["scores"]).min(axis=1)
    worst = int(np.argmin([one.p or -one.effect for one in columns]))
    signals = _signals(list(SIGNALS), np.column_stack([-p, *(found[key][:, 0] for key in SIGNALS if key != "scores")]))
    seen = {"effect": columns[worst].effect, "usual": columns[worst].usual}
    return columns, (replace(signals[0], **seen), *signals[1:])


def _signals(keys: Sequence[str], distances: np.ndarray) -> tuple[Signal, ...]:
    """One for each column of distances, float64 [deals, m], corrected for their number."""
    if len(distances) == 1:
        return tuple(Signal(key, float(effect)) for key, effect in zip(keys, distances[0], strict=True))
    p = _p_of_deals(distances)
    # Step down from the smallest p value: how often is one of it and all larger ones as small by chance?
    order = np.argsort(p[0], kind="stable")
    smallest = np.minimum.accumulate(p[:, order[::-1]], axis=1)[:, ::-1]
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate((smallest <= p[0, order]).mean(axis=0))
    usual = np.quantile(distances[1:], 0.95, axis=0)
    return tuple(
        Signal(key, *map(float, values))
        for key, *values in zip(keys, distances[0], usual, p[0], corrected, strict=True)
    )


def _p_of_deals(distances: np.ndarray) -> np.ndarray:
    """float64 [deals, m], which share of all deals is as far as each, itself among them; the first is the p value."""
    from scipy.stats import rankdata

    rounded = -np.round(distances, 6)  # equal ones differ by how they were added up
    return rankdata(rounded, method="max", axis=0) / len(distances)


def _caveats(batch: Sample, reference: Sample) -> list[str]:
    caveats = []
    for name, side in (("batch", batch), ("validation part", reference)):
        if side.n_lots < LEAST_LOTS:
            caveats.append(
                f"Not enough lots: the {name} has {side.n_lots}, and a verdict needs {LEAST_LOTS} on either side. Lots "
                "and not maps are compared, because the maps of a lot are alike."
            )
        elif side.n_lots == len(side) and (side.weights == 1).all():  # of each lot one map may be all that was kept
            caveats.append(
                f"The maps of the {name} name no lots that they share, so each counts as a lot of its own. If they do "
                "come from common lots, p values are too small and alarms too frequent."
            )
    return caveats


def _odd_lots(table: np.ndarray, names: np.ndarray, *, most: int = 5) -> tuple[tuple[int, float, float], ...]:
    """The batch's lots whose features are furthest from the mean of the reference, itself left out of its own."""
    batch, rest = table[: len(names)], table[len(names) :]
    usual = np.sort(np.linalg.norm((rest - rest.mean(axis=0)) * len(rest) / max(1, len(rest) - 1), axis=1))
    far = np.linalg.norm(batch - rest.mean(axis=0), axis=1)
    order = np.argsort(-far, kind="stable")[:most]
    return tuple((int(names[i]), float(far[i]), float(np.searchsorted(usual, far[i]) / len(usual))) for i in order)

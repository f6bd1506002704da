"""Generated wafer maps: nine failure classes on round die grids, grouped into lots.

The generator stands in for WM-811K where no download is wanted. Every map starts from a yield model, a probability of
failing for each die, to which the defect of its class is added; dies then fail independently. Lots share what real lots
share: the die grid, the yield, and the place, size and strength of a defect that comes back wafer after wafer.

The constants were set by comparing generated maps with WM-811K class by class (fail density, its radial profile, map
sizes, background). Classes overlap as they do there: a faint Loc looks like none, a long Edge-Loc like an Edge-Ring.
WM-811K: Wu, Jang and Chen, "Wafer Map Failure Pattern Recognition and Similarity Ranking for Large-Scale Data Sets",
IEEE Transactions on Semiconductor Manufacturing 28(1), 2015, doi 10.1109/TSM.2014.2364237.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from waferlab.data.maps import CLASS_NAMES

# Shapes (rows, columns) that make up most of WM-811K, and how often each is drawn. Small dies fill large grids.
COARSE_GRIDS = ((25, 27), (27, 25), (26, 26))
COARSE_GRID_WEIGHTS = (0.5, 0.3, 0.2)
FINE_GRIDS = (
    *((29, 26), (33, 29), (30, 34), (35, 31), (33, 37), (38, 36), (39, 37), (39, 31), (41, 33), (41, 41), (43, 42)),
    *((44, 41), (45, 43), (46, 46), (48, 48), (53, 52), (52, 59), (63, 62), (71, 70), (107, 150)),
)
FINE_GRID_WEIGHTS = (*((0.06,) * 15), 0.04, 0.02, 0.03, 0.02, 0.02)

# Share of each class that sits on a coarse grid (WM-811K: 0.46, 0.01, 0.30, 0.04, 0.24, 0.42, 0.25, 0.26, 0.79; drawn
# closer together so that the size of a map does not give its class away).
COARSE_SHARE = (0.45, 0.08, 0.30, 0.10, 0.25, 0.40, 0.25, 0.25, 0.70)
# Median share of dies that fail away from the defect (WM-811K, the quieter sectors of a map).
BACKGROUND = (0.140, 0.105, 0.105, 0.055, 0.075, 0.150, 0.150, 0.055, 0.115)

LATENTS = 24  # random numbers that describe one map, more than any class uses
LOT_CORRELATION = 0.4  # of those numbers, between two wafers of the same class in one lot


@dataclass(frozen=True)
class DieGrid:
    """The dies of one wafer layout.

    Attributes:
        shape: rows and columns of the map.
        is_die: bool [h, w], True where there is a die.
        x, y: float32 [dies], die centres, -1 to 1 across the wafer.
        radius: float32 [dies], 0 at the centre, about 1 at the edge.
        corner_radius: float32 [dies], radius of the outermost corner of the die.
        angle: float32 [dies], -pi to pi.
        column, row: int64 [dies], place in the map.
    """

    shape: tuple[int, int]
    is_die: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    corner_radius: np.ndarray
    angle: np.ndarray
    column: np.ndarray
    row: np.ndarray

    @classmethod
    def create(cls, shape: tuple[int, int], reach: float) -> DieGrid:
        """Lays dies on a wafer; `reach` (about 1) is the largest radius at which the centre of a die still counts."""
        height, width = shape
        # A die is rarely square, so the round wafer is an ellipse in rows and columns: each axis has its own unit.
        y = (2 * np.arange(height, dtype=np.float32) + 1 - height)[:, None] / height
        x = (2 * np.arange(width, dtype=np.float32) + 1 - width)[None, :] / width
        radius = np.hypot(x, y)
        is_die = radius <= reach
        row, column = np.nonzero(is_die)
        corner_radius = np.hypot(np.abs(x) + np.float32(1 / width), np.abs(y) + np.float32(1 / height))
        angle = np.arctan2(np.broadcast_to(y, shape), np.broadcast_to(x, shape))
        per_die = (x[0, column], y[row, 0], radius[is_die], corner_radius[is_die], angle[is_die])
        return cls(shape, is_die, *per_die, column, row)

    @property
    def pitch(self) -> float:
        """Size of a die in wafer radii, the mean of both directions."""
        return 2.0 / math.sqrt(self.shape[0] * self.shape[1])


class Latents:
    """The numbers behind one map, read one after the other; close to each other for wafers of one lot and class."""

    def __init__(self, normals: np.ndarray) -> None:
        self._normals = iter(normals.tolist())

    def normal(self, mean: float = 0.0, deviation: float = 1.0) -> float:
        """Returns a normal number."""
        return mean + deviation * next(self._normals)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Returns a number that is as good as uniform in (low, high)."""
        # The logistic curve is within 0.01 of the normal distribution function, and fast.
        return low + (high - low) / (1.0 + math.exp(-1.702 * next(self._normals)))

    def log_uniform(self, low: float, high: float) -> float:
        """Returns a number whose logarithm is uniform; `low` and `high` are above 0."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def angle(self) -> float:
        """Returns a direction in radians, -pi to pi."""
        return self.uniform(-math.pi, math.pi)


def _soft_step(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 well inside (negative distance), 0 well outside, over about `softness` on each side."""
    return 1.0 / (1.0 + np.exp(np.clip(distance * (2.0 / softness), -30.0, 30.0)))


def _wobble(grid: DieGrid, rng: np.random.Generator, amplitude: float, frequency: float = 4.0) -> np.ndarray:
    """A smooth random surface that makes outlines irregular; `frequency` in radians across a wafer radius."""
    frequencies = rng.normal(0.0, frequency, (3, 2)).astype(np.float32)
    phase = rng.uniform(0.0, 2.0 * math.pi, 3).astype(np.float32)
    surface = sum(np.sin(fx * grid.x + fy * grid.y + shift) for (fx, fy), shift in zip(frequencies, phase, strict=True))
    return surface * np.float32(amplitude / 2.0)


def _blob(
    grid: DieGrid, rng: np.random.Generator, *, x: float, y: float, size: float,
    elongation: float = 1.0, tilt: float = 0.0, softness: float = 0.5,
) -> np.ndarray:  # fmt: skip
    """An irregular ellipse of mean half-axis `size` around (x, y)."""
    cos, sin, stretch = math.cos(tilt), math.sin(tilt), math.sqrt(elongation)
    along = ((grid.x - x) * cos + (grid.y - y) * sin) / (size * stretch)
    across = ((grid.y - y) * cos - (grid.x - x) * sin) * (stretch / size)
    outline = 1.0 - _wobble(grid, rng, 0.35, min(max(1.2 / size, 4.0), 12.0))  # small spots need finer waves
    return _soft_step(np.hypot(along, across) - outline, softness)


def _angular_distance(grid: DieGrid, centre: float) -> np.ndarray:
    """Radians from the direction `centre`, 0 to pi."""
    return np.abs((grid.angle - (centre - math.pi)) % (2.0 * math.pi) - math.pi)


def _stripes(grid: DieGrid, rng: np.random.Generator) -> np.ndarray:
    """Every second or third row or column spared: what a fault of one exposure field leaves."""
    period = int(rng.integers(2, 4))
    line = grid.row if rng.random() < 0.5 else grid.column
    return np.where(line % period == 0, np.float32(0.25), np.float32(1.0))


def _center(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """A spot in the middle, sharp or fading, from a few dies to most of the wafer."""
    x, y = latents.normal(0.0, 0.06), latents.normal(0.0, 0.06)
    size, strength = max(latents.log_uniform(0.10, 0.60), 1.6 * grid.pitch), latents.uniform(0.6, 1.0) ** 0.5
    softness, elongation, tilt = latents.log_uniform(0.1, 0.6), math.exp(latents.normal(0.0, 0.25)), latents.angle()
    field = strength * _blob(grid, rng, x=x, y=y, size=size, elongation=elongation, tilt=tilt, softness=softness)
    if latents.uniform() < 0.05:
        field = field * _stripes(grid, rng)
    return field


def _donut(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """A ring around a clean middle, often open or swollen on one side."""
    x, y = latents.normal(0.0, 0.06), latents.normal(0.0, 0.06)
    hole, width = latents.uniform(0.15, 0.42), max(latents.log_uniform(0.07, 0.40), 1.2 * grid.pitch)
    strength, softness = latents.uniform(0.5, 1.0) ** 0.5, latents.log_uniform(0.02, 0.09)
    direction, bias = latents.angle(), latents.uniform(0.0, 1.1)
    distance = np.hypot(grid.x - x, grid.y - y) + _wobble(grid, rng, 0.06)
    # The hole is round; the ring around it is thick on one side and thin, faint or open on the other.
    side = np.cos(grid.angle - direction)
    ring = _soft_step(hole - distance, softness) * _soft_step(distance - hole - width * (1.0 + bias * side), softness)
    if latents.uniform() < 0.35:
        ring *= _soft_step(_angular_distance(grid, direction) - latents.uniform(1.6, 2.8), 0.2)
    return strength * ring


def _edge_loc(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """A patch along part of the edge; the longest come close to an Edge-Ring."""
    direction, strength = latents.angle(), latents.uniform(0.6, 1.0) ** 0.5
    half_arc, depth = latents.log_uniform(0.22, 1.7), max(latents.log_uniform(0.08, 0.50), 1.5 * grid.pitch)
    softness, taper = latents.log_uniform(0.02, 0.12), latents.log_uniform(0.05, 0.3)
    if latents.uniform() < 0.25:  # a round patch that happens to lie on the edge
        x, y, size = 0.97 * math.cos(direction), 0.97 * math.sin(direction), max(0.8 * depth, 1.5 * grid.pitch)
        return strength * _blob(grid, rng, x=x, y=y, size=size, elongation=1.3, tilt=direction + 1.6, softness=0.3)
    away = _angular_distance(grid, direction)
    # The patch is deepest in its middle and thins out towards its ends.
    local_depth = depth * (1.0 - 0.6 * np.minimum(away / half_arc, 1.5) ** 2)
    field = strength * _soft_step((0.98 - grid.radius) + _wobble(grid, rng, 0.05) - local_depth, softness)
    return field * _soft_step(away - half_arc, taper)


def _edge_ring(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """A thin ring along the edge, at times uneven or with a gap."""
    depth = grid.pitch * latents.log_uniform(0.5, 1.3) + 0.05 * latents.uniform() ** 2
    strength, direction, unevenness = latents.uniform(0.7, 1.0) ** 0.5, latents.angle(), latents.uniform() ** 2
    side = 0.5 - 0.5 * np.cos(grid.angle - direction)  # 0 at the weakest direction, 1 opposite
    local_depth = depth * (1.0 - 0.5 * unevenness * (1.0 - side))
    field = strength * _soft_step((1.0 - grid.radius) - local_depth, 0.4 * grid.pitch)
    if latents.uniform() < 0.3:
        field *= 1.0 - 0.8 * _soft_step(_angular_distance(grid, direction) - latents.uniform(0.2, 1.2), 0.2)
    return field


def _loc(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """One or two spots away from the middle, compact, drawn out or crescent-shaped."""
    direction, distance = latents.angle(), latents.uniform(0.15, 0.95)
    size, strength = max(latents.log_uniform(0.10, 0.45), 1.5 * grid.pitch), latents.uniform(0.65, 1.0) ** 0.5
    softness, elongation, tilt = latents.log_uniform(0.1, 0.5), latents.log_uniform(0.8, 3.5), latents.angle()
    x, y = distance * math.cos(direction), distance * math.sin(direction)
    spot = {"elongation": elongation, "tilt": tilt, "softness": softness}
    field = strength * _blob(grid, rng, x=x, y=y, size=size, **spot)
    kind = latents.uniform()
    if kind < 0.25:  # a second, smaller spot somewhere else
        x, y = rng.uniform(-0.7, 0.7, 2).tolist()
        field = np.maximum(field, strength * _blob(grid, rng, x=x, y=y, size=0.6 * size, **spot))
    elif kind < 0.5:  # a crescent: the spot with a bite taken out of the side that faces the centre
        bite = _blob(grid, rng, x=0.6 * x, y=0.6 * y, size=size, **spot)
        field = field * (1.0 - 0.9 * bite)
    elif kind > 0.9:
        field = field * _stripes(grid, rng)
    return field


def _near_full(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """Almost every die, but for a patch or a weaker edge."""
    level = latents.uniform(0.74, 1.02)
    field = np.clip(level + _wobble(grid, rng, latents.uniform(0.0, 0.2)), 0.0, 1.0)
    direction, distance, size = latents.angle(), latents.uniform(0.5, 1.0), latents.uniform(0.05, 0.45)
    x, y = distance * math.cos(direction), distance * math.sin(direction)
    spared = _blob(grid, rng, x=x, y=y, size=size)
    edge = latents.uniform(0.0, 0.25) * np.exp((grid.radius - 1.0) / 0.1)
    return field * (1.0 - latents.uniform(0.0, 0.9) * spared) * (1.0 - edge)


def _random(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """Failures all over, at a level that drifts across the wafer."""
    level, contrast = latents.uniform(0.2, 0.6), latents.uniform(0.0, 0.8)
    rings = np.cos(latents.uniform(2.0, 8.0) * grid.radius + latents.angle())
    field = level + contrast * (0.3 * rings + _wobble(grid, rng, 0.6))
    if latents.uniform() < 0.15:
        field = field * (0.2 + 1.2 * _stripes(grid, rng))
    return np.clip(field, 0.03, 0.97)


def _scratch(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """One line or a few, straight or curved, along the dies or across them."""
    field = np.zeros(grid.x.size, np.float32)
    strength, length = latents.uniform(0.7, 1.0) ** 0.5, max(latents.log_uniform(0.4, 1.9), 6.0 * grid.pitch)
    heading, curvature = latents.angle(), latents.normal(0.0, 0.9)
    if latents.uniform() < 0.35:  # saws and handlers move along the die rows and columns
        heading, curvature = round(heading / (math.pi / 2)) * (math.pi / 2), 0.1 * curvature
    radius, direction = latents.uniform(0.0, 0.95), latents.angle()
    x, y = radius * math.cos(direction), radius * math.sin(direction)
    lines = 1 if latents.uniform() < 0.65 else int(rng.integers(2, 5))
    width = 1.0 if latents.uniform() < 0.85 else 2.0
    for _ in range(lines):
        field = np.maximum(field, strength * _line(grid, x, y, heading, curvature, length, width))
        x, y = x + float(rng.normal(0.0, 0.3)), y + float(rng.normal(0.0, 0.3))
        heading, length = heading + float(rng.normal(0.0, 0.3)), length * float(rng.uniform(0.5, 1.2))
    return field


def _line(
    grid: DieGrid, x: float, y: float, heading: float, curvature: float, length: float, width: float
) -> np.ndarray:
    """An arc through (x, y), `width` dies wide: 1 on the dies it touches, 0 elsewhere."""
    height, columns = grid.shape
    steps = np.linspace(-length / 2, length / 2, max(4, int(length * max(grid.shape))))
    turning = heading + curvature * steps
    step = steps[1] - steps[0]
    path_x = x + np.cumsum(np.cos(turning)) * step - length / 2 * math.cos(heading)
    path_y = y + np.cumsum(np.sin(turning)) * step - length / 2 * math.sin(heading)
    touched = np.zeros(grid.shape, np.float32)
    for offset in np.arange(width) * (2.0 / max(grid.shape)):
        column = np.floor((path_x - offset * math.sin(heading) + 1) * (columns / 2)).astype(np.int64)
        row = np.floor((path_y + offset * math.cos(heading) + 1) * (height / 2)).astype(np.int64)
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < height)
        touched[row[inside], column[inside]] = 1.0
    return touched[grid.is_die]


def _none(grid: DieGrid, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """Nothing a reviewer would name: now and then a clump or a thickening in the middle that is too faint to count."""
    kind = latents.uniform()
    if kind > 0.16:
        return np.zeros(grid.x.size, np.float32)
    x, y = rng.uniform(-0.8, 0.8, 2).tolist() if kind < 0.08 else (0.0, 0.0)
    size, strength = latents.uniform(0.06, 0.25), latents.uniform(0.1, 0.4)
    return strength * _blob(grid, rng, x=x, y=y, size=size, elongation=1.5)


_DEFECTS: tuple[Callable[[DieGrid, Latents, np.random.Generator], np.ndarray], ...] = (
    *(_center, _donut, _edge_loc, _edge_ring, _loc, _near_full, _random, _scratch, _none),
)


def _background(grid: DieGrid, label: int, latents: Latents, rng: np.random.Generator) -> np.ndarray:
    """Yield loss without a defect: a lot's level, a slope across the wafer, weak dies at the edge and in the centre."""
    deviation = latents.normal()
    # Clean lots are far cleaner than the median, poor lots only somewhat poorer.
    level = BACKGROUND[label] * math.exp(deviation * (0.9 if deviation < 0.0 else 0.4))
    tilt, direction, bulge = latents.uniform(0.0, 0.4), latents.angle(), latents.normal(0.0, 0.25)
    edge, middle = latents.uniform() ** 1.3, latents.uniform() ** 2
    slope = tilt * (grid.x * math.cos(direction) + grid.y * math.sin(direction))
    shape = 1.0 + slope + bulge * (0.5 - grid.radius**2) + _wobble(grid, rng, 0.15)
    # At the edge, dies whose corner sticks out furthest suffer most; in the centre it is one or two dies.
    rim = edge * np.exp((grid.corner_radius - grid.corner_radius.max()) / (0.6 * grid.pitch))
    hub = middle * np.exp(-((grid.radius / (0.7 * grid.pitch)) ** 2))
    return np.clip(level * shape + 0.8 * rim + hub, 0.0, 0.95)


def _plan_lots(counts: Sequence[int], rng: np.random.Generator) -> list[tuple[bool, list[int]]]:
    """Deals the maps into lots of mostly 8 to 14 maps and one to three classes.

    Returns:
        For each lot, whether its grid is a coarse one, and its labels.
    """
    runs: dict[bool, list[list[int]]] = {False: [], True: []}
    for label, count in enumerate(counts):
        while count > 0:
            run = min(count, int(rng.integers(3, 9)))
            runs[bool(rng.random() < COARSE_SHARE[label])].append([label] * run)
            count -= run
    lots = []
    for coarse, pool in runs.items():
        lot: list[int] = []
        for index in rng.permutation(len(pool)).tolist():
            lot += pool[index]
            if len(lot) >= rng.integers(7, 12):
                lots.append((coarse, lot))
                lot = []
        if lot:
            lots.append((coarse, lot))
    return lots


def _draw_grid(coarse: bool, rng: np.random.Generator) -> DieGrid:
    shapes, weights = (COARSE_GRIDS, COARSE_GRID_WEIGHTS) if coarse else (FINE_GRIDS, FINE_GRID_WEIGHTS)
    share = np.asarray(weights) / np.sum(weights)
    return DieGrid.create(shapes[int(rng.choice(len(shapes), p=share))], float(rng.uniform(0.98, 1.01)))


def _check_counts(samples_per_class: int | Sequence[int]) -> list[int]:
    counts = [samples_per_class] * len(CLASS_NAMES) if np.ndim(samples_per_class) == 0 else list(samples_per_class)
    if len(counts) != len(CLASS_NAMES):
        raise ValueError(
            f"samples_per_class has {len(counts)} counts: "
            f"give one for each of the {len(CLASS_NAMES)} classes ({', '.join(CLASS_NAMES)}), or one number for all"
        )
    for name, count in zip(CLASS_NAMES, counts, strict=True):
        if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"samples_per_class is {count!r} for {name}: every class needs a whole number of maps, 1 or more"
            )
    return [int(count) for count in counts]


def generate_wafer_maps(
    samples_per_class: int | Sequence[int] = 150, *, seed: int = 0
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Draws wafer maps of nine failure classes, grouped into lots.

    Args:
        samples_per_class: maps of every class (1 or more), or nine counts in the order of `CLASS_NAMES`.
        seed: 0 or more; the same seed and counts give the same maps, bit by bit.

    Returns:
        maps: list of N arrays, uint8 [h, w], 25 x 27 to 107 x 150; 0 no die, 1 pass, 2 fail.
        labels: int64 [N], index into `CLASS_NAMES`.
        lots: int64 [N], number of the lot, from 0; a lot has one die grid and a few classes, mostly one to three.

    Raises:
        ValueError: if a count is below 1 or not a whole number, if there are not nine counts, or if the seed is
            negative or not a whole number.
    """
    counts = _check_counts(samples_per_class)
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}: the random number generator takes a whole number, 0 or more")
    rng = np.random.default_rng(seed)
    maps: list[np.ndarray] = []
    labels: list[int] = []
    lots: list[int] = []
    for lot, (coarse, lot_labels) in enumerate(_plan_lots(counts, rng)):
        grid = _draw_grid(coarse, rng)
        maps += _draw_lot(grid, lot_labels, rng)
        labels += lot_labels
        lots += [lot] * len(lot_labels)
    return maps, np.array(labels, np.int64), np.array(lots, np.int64)


def _draw_lot(grid: DieGrid, labels: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Draws one wafer map for every label, all on `grid`."""
    habits = rng.normal(size=(len(CLASS_NAMES) + 1, LATENTS))  # a row for each class, and one for the lot's background
    own, shared = math.sqrt(1.0 - LOT_CORRELATION), math.sqrt(LOT_CORRELATION)
    missing = rng.uniform(0.01, 0.06) if rng.random() < 0.05 else 0.0  # dies that were never tested
    maps = []
    for label in labels:
        normals = shared * habits[[label, -1]] + own * rng.normal(size=(2, LATENTS))
        defect = _DEFECTS[label](grid, Latents(normals[0]), rng)
        background = _background(grid, label, Latents(normals[1]), rng)
        survives = (1.0 - defect) * (1.0 - background)
        wafer_map = np.zeros(grid.shape, np.uint8)
        wafer_map[grid.is_die] = 1 + (rng.random(grid.x.size, dtype=np.float32) > survives)
        if missing:
            wafer_map[rng.random(grid.shape) < missing] = 0
        maps.append(wafer_map)
    return maps

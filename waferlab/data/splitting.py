"""Three parts of which no two share a lot or a copy of a map: lots at random, or the last lots as the test."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from waferlab.data.maps import CLASS_NAMES, NUM_CLASSES, WaferMaps
from waferlab.errors import DataError

PARTS = ("train", "validation", "test")
SHARES = np.array([0.70, 0.15, 0.15])
LEAST_FOR_TRAINING = 0.60  # of all maps
NEAR = 0.05  # a share that is further off is named in a note
LAST_LOTS = 0.20  # of all lots: the test part, where they are split in order
SPLITS = {  # how, and what that means, for people
    "lots": "lots at random, 70 / 15 / 15% of the maps, class by class",
    "ordered": f"in order: the last {100 * LAST_LOTS:.0f}% of the lots are the test part",
}

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


def split_maps(maps: WaferMaps, *, how: str = "lots", seed: int = 0) -> Split:
    """`split_by_lot` or `split_in_order`, by a name of `SPLITS`."""
    return {"lots": split_by_lot, "ordered": split_in_order}[how](maps, seed=seed)


def split_in_order(maps: WaferMaps, *, seed: int = 0) -> Split:
    """The last 20% of the lots are the test part, as tomorrow's wafers would be; the others are dealt at random.

    Lots come in the order of their numbers: whole numbers as the data have them, WM-811K's in the order of its rows,
    names in the order of the alphabet; where no lot is known, maps in the order of the data. Where some are known, the
    others (numbers below 0) are in no part, as they may be of any lot. Earlier maps of which the
    test part has a copy, turned and mirrored ones included, are in no part; maps without a failing die are copies of
    each other by nature and stay. The earlier lots are split by `split_by_lot`, whose validation part (15% of them) is
    the validation; the rest is for training. A class that first appears in the last lots cannot be answered, so its
    maps are in no part either. Notes tell of all this.

    Raises:
        DataError: the earlier lots have fewer than two classes, or too few units for three parts; or no class of theirs
            is in the last lots.
    """
    groups = np.arange(len(maps)) if (maps.groups < 0).all() else maps.groups
    unknown = groups < 0
    lots = np.unique(groups[~unknown])
    n_last = max(1, round(LAST_LOTS * len(lots)))
    last = groups >= lots[-n_last]
    failing, digests = np.maximum.reduceat(maps.maps_flat, maps.offsets[:-1]) == 2, maps.digests()
    copies = ~last & ~unknown & failing & np.isin(digests, digests[last & failing])
    earlier = np.flatnonzero(~last & ~copies & ~unknown)
    dealt = split_by_lot(maps.select(earlier), seed=seed)
    train, validation = earlier[np.union1d(dealt.train, dealt.test)], earlier[dealt.validation]
    known = np.bincount(maps.labels[train], minlength=NUM_CLASSES) > 0
    test = np.flatnonzero(last & known[maps.labels])
    if not len(test):
        raise DataError(
            f"{maps.source}: the last {n_last:,} lots have no class that earlier ones have, so nothing is left to test "
            "on. Choose split='lots', or bring the lots into their order."
        )
    share = f"{len(test) / len(maps):.0%} of the maps"
    notes = [
        f"Test: the last {n_last:,} of {len(lots):,} lots, {share}; none of them lies before, nor a copy of a "
        "map with a failing die."
    ]
    if copies.any():
        notes.append(f"{copies.sum():,} earlier maps are in no part: the test part has a copy of each.")
    if unknown.any():
        notes.append(f"{unknown.sum():,} maps of unknown lot are in no part: they may be of any lot.")
    notes += _notes_on_order(maps, (train, validation, test))
    return Split(train, validation, test, _fingerprint(maps, (train, validation, test)), tuple(notes))


def _notes_on_order(maps: WaferMaps, parts: Sequence[np.ndarray]) -> list[str]:
    """Which classes some part lacks, a sentence each, and whether training is small."""
    counts, notes = np.stack([np.bincount(maps.labels[part], minlength=NUM_CLASSES) for part in parts]), []
    for name, held, n_maps in zip(CLASS_NAMES, counts.T, maps.class_counts, strict=True):
        lacking = " and ".join(part for part, count in zip(PARTS, held, strict=True) if count == 0)
        if n_maps == 0:
            notes.append(f"{name}: no map in these data. The class is left out of the answers and the scores.")
        elif held[0] == 0:
            notes.append(
                f"{name}: its {n_maps:,} maps are in no part, since all come from the last lots or have a copy there. "
                "The class is left out of the answers and the scores."
            )
        elif lacking:
            notes.append(f"{name}: none in {lacking}, since lots keep their order.")
    share = len(parts[0]) / len(maps)
    if share < LEAST_FOR_TRAINING:
        notes.append(
            f"Training has {share:.1%} of all maps, less than {LEAST_FOR_TRAINING:.0%}, as the last lots are large."
        )
    return notes


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


def split_into_folds(maps: WaferMaps, *, folds: int, seed: int = 0) -> list[Split]:
    """So many splits whose test parts together hold each map once, with each class spread over them.

    No lot, and no copy of a map, is in two parts of a split. What is not its test part is split by `split_by_lot`,
    whose validation part is the validation; the rest is for training.

    Raises:
        DataError: there are fewer units of lots than folds, or too few units to train on.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    units = _lots_joined_by_copies(maps)
    if not 2 <= folds <= units.max() + 1:
        raise DataError(
            f"{maps.source}: {folds} folds of {units.max() + 1} lots, those that share copies of maps counted as one. "
            "Choose two folds or more, and no more than there are lots."
        )
    with warnings.catch_warnings():  # of classes with fewer maps than folds: they are then in some folds only
        warnings.simplefilter("ignore", UserWarning)
        dealer = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        dealt = list(dealer.split(units, maps.labels, units))
    splits = []
    for others, test in dealt:
        rest = split_by_lot(maps.select(others), seed=seed)
        parts = others[np.union1d(rest.train, rest.test)], others[rest.validation], test
        splits.append(Split(*parts, _fingerprint(maps, parts), rest.notes))
    return splits


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

"""Promises about splitting wafer maps: no lot and no copy in two parts, every class in its share, the same again."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from waferlab.data.maps import CLASS_NAMES, pack_maps
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot, split_in_order, split_into_folds, split_maps
from waferlab.errors import DataError


@pytest.fixture(scope="module")
def generated():
    return load_wafer_maps(samples_per_class=60, seed=1)


def test_no_lot_is_in_two_splits(generated):
    parts = split_by_lot(generated, seed=0).parts().values()
    lots = [set(generated.groups[part]) for part in parts]
    assert not (lots[0] & lots[1] or lots[0] & lots[2] or lots[1] & lots[2])
    assert sorted(np.concatenate(list(parts))) == list(range(len(generated)))


def made_up(labels, lots, *, seed=0):
    """Maps of 6x6 dies, no two alike and each with failing dies."""
    rng = np.random.default_rng(seed)
    return pack_maps(list(rng.integers(1, 3, (len(labels), 6, 6), np.uint8)), labels, groups=lots, source="made up")


def shares_of(maps, split):
    """Share of each class that is in each part, [3, 9]; NaN for a class without maps."""
    counts = np.stack([np.bincount(maps.labels[part], minlength=9) for part in split.parts().values()])
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(0)


def test_every_class_is_in_every_part_in_about_its_share():
    maps = load_wafer_maps()
    for seed in range(5):
        split = split_by_lot(maps, seed=seed)
        assert np.abs(shares_of(maps, split) - [[0.70], [0.15], [0.15]]).max() < 0.05
        assert abs(len(split.train) / len(maps) - 0.70) < 0.01
        assert abs(len(split.test) / len(maps) - 0.15) < 0.01
        assert split.notes == ()


def test_a_class_whose_lots_are_too_large_for_its_shares_is_named(generated):
    named = 0
    for seed in range(20):
        split = split_by_lot(generated, seed=seed)
        off = (np.abs(shares_of(generated, split) - [[0.70], [0.15], [0.15]]) > 0.0501).any(0)
        for label in np.flatnonzero(off):
            assert f"{CLASS_NAMES[label]} " in "".join(split.notes)
        assert off.any() or not split.notes
        named += off.any()
    assert 0 < named < 10


@pytest.mark.parametrize("maps_in_a_lot", [1, 7, 60])
def test_rare_classes_in_many_lots_have_their_share_too(maps_in_a_lot):
    labels = np.random.default_rng(0).choice(9, 9000, p=[0.02] * 6 + [0.01] * 2 + [0.86])
    maps = made_up(labels, np.arange(9000) // maps_in_a_lot)
    for seed in range(3):
        assert np.abs(shares_of(maps, split_by_lot(maps, seed=seed)) - [[0.70], [0.15], [0.15]]).max() < 0.05


def test_large_lots_are_in_the_test_part_as_often_as_small_ones():
    sizes = np.tile([2, 5, 10, 30], 30)
    lots = np.repeat(np.arange(120), sizes)
    maps = made_up(np.random.default_rng(0).integers(0, 9, len(lots)), lots)
    in_test = np.zeros(120)
    tests = []
    for seed in range(100):
        tests.append(set(lots[split_by_lot(maps, seed=seed).test]))
        in_test[list(tests[-1])] += 1 / 100
    # 30 lots of a size, 100 seeds: the mean has a standard error of 0.007
    assert all(abs(in_test[size::4].mean() - 0.15) < 0.03 for size in range(4))
    # Seeds are as good as independent: two random 15% of the lots have 8% of their union in common.
    common = [len(a & b) / len(a | b) for a, b in itertools.pairwise(tests)]
    assert np.mean(common) < 0.12


def test_lots_that_lie_side_by_side_are_dealt_independently():
    maps = made_up(np.arange(400) % 2, np.arange(400))
    in_test = np.zeros(400, bool)
    in_test[split_by_lot(maps, seed=0).test] = True
    assert in_test[:-2][in_test[2:]].mean() < 0.35  # 60 of 400: 0.15 by chance, nearly 1 if they stayed in order


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", [0, 8, 9, 11])  # the last three deal a lot of 30% to another part first
def test_a_giant_lot_goes_to_training_and_the_run_is_told_where_shares_suffer(share, seed):
    lots = 1 + np.arange(2000) // 10
    lots[: int(2000 * share)] = 0
    maps = made_up(np.random.default_rng(1).integers(0, 9, 2000), lots)
    split = split_by_lot(maps, seed=seed)
    assert len(split.train) >= 0.6 * 2000
    assert (shares_of(maps, split) > 0).all()
    assert 0 in maps.groups[split.train]
    assert (np.abs(shares_of(maps, split) - [[0.70], [0.15], [0.15]]).max() < 0.06) == (share < 0.9)
    assert any("all maps 90 / 5 / 5%" in note for note in split.notes) == (share == 0.9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("lots_of_it", "parts", "note"),
    [
        (
            1,
            [True, False, False],
            "Scratch: none in validation and test, since no lot is cut and its 60 maps come from 1",
        ),
        (2, [True, False, True], "Scratch: none in validation, since no lot is cut and its 60 maps come from 2 lots"),
        (3, [True, True, True], "Scratch 33 / 33 / 33% (60 maps from 3 lots, the largest with 20)"),
    ],
)
def test_a_class_in_few_lots_is_in_training_first_and_costs_the_others_nothing(seed, lots_of_it, parts, note):
    labels = np.repeat(np.arange(9), 60)
    lots = np.random.default_rng(2).integers(0, 40, len(labels))
    scratch = labels == CLASS_NAMES.index("Scratch")
    lots[scratch] = 100 + np.arange(60) % lots_of_it
    maps = made_up(labels, lots)
    split = split_by_lot(maps, seed=seed)
    shares = shares_of(maps, split)
    assert (shares[:, CLASS_NAMES.index("Scratch")] > 0).tolist() == parts
    assert len(split.train) >= 0.6 * len(maps)
    assert (np.delete(shares, CLASS_NAMES.index("Scratch"), axis=1) > 0).all()
    assert any(note in said for said in split.notes), split.notes


def test_a_class_is_rather_missing_from_test_than_from_training():
    """Each of two lots is the only one of a class; five more classes are in just these two, and want one in test."""
    both = [4] * 5
    table = np.array([[6, 0, *both, 0], [0, 6, *both, 0], *[[0] * 7 + [5]] * 6])
    maps = made_up(np.repeat(np.tile(np.arange(8), 8), table.ravel()), np.repeat(np.arange(8), table.sum(1)))
    for seed in range(6):
        split = split_by_lot(maps, seed=seed)
        assert {0, 1} <= set(maps.groups[split.train])
        assert sum("none in validation and test" in note for note in split.notes) == 7


@pytest.mark.parametrize(
    "table",
    [
        [[20, 0], [0, 35], [30, 5], [0, 30], [15, 15], [0, 30]],
        [[0, 30], [10, 0], [0, 15], [15, 30], [20, 10], [0, 20], [0, 10]],
    ],
)
def test_training_has_60_percent_where_the_shares_of_the_classes_alone_would_give_it_less(table):
    """Maps of two classes in each lot; the classes' shares alone lead to 56 and 59%, whatever the seed."""
    table = np.array(table)
    maps = made_up(
        np.repeat(np.tile([0, 1], len(table)), table.ravel()), np.repeat(np.arange(len(table)), table.sum(1))
    )
    for seed in range(4):
        assert len(split_by_lot(maps, seed=seed).train) >= 0.6 * len(maps)


@pytest.mark.parametrize("n_lots", [3, 4, 6, 10])
def test_few_lots_are_split_all_the_same_and_every_answerable_class_is_in_training(n_lots):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        maps = made_up(rng.integers(0, 9, 300), rng.integers(0, n_lots, 300))
        split = split_by_lot(maps, seed=seed)
        assert (shares_of(maps, split)[0] > 0).all()
        assert min(len(part) for part in split.parts().values()) > 0
        lots = [set(maps.groups[part]) for part in split.parts().values()]
        assert not (lots[0] & lots[1] or lots[0] & lots[2] or lots[1] & lots[2])
        short = len(split.train) < 0.6 * 300
        assert not short or any("all maps" in note for note in split.notes)


@pytest.mark.parametrize("every", [1, 2])
def test_perfect_wafers_tie_no_lots_together(generated, every):
    perfect = (generated[0] > 0).astype(np.uint8)
    lots = np.unique(generated.groups)[::every]
    maps = pack_maps(
        [generated[i] for i in range(len(generated))] + [perfect] * len(lots),
        np.concatenate([generated.labels, np.full(len(lots), CLASS_NAMES.index("none"))]),
        groups=np.concatenate([generated.groups, lots]),
        source="a perfect wafer in many lots",
    )
    split = split_by_lot(maps, seed=0)
    assert abs(len(split.train) / len(maps) - 0.70) < 0.03
    assert split.notes == ()


def turned_copies(maps, indices, view):
    copies = [np.ascontiguousarray(view(maps[i])) for i in indices]
    return pack_maps(
        [maps[i] for i in range(len(maps))] + copies,
        np.concatenate([maps.labels, maps.labels[indices]]),
        groups=np.concatenate([maps.groups, 10_000 + np.arange(len(indices))]),  # copies turn up in other lots
        source="with copies",
    )


VIEWS = {
    "the same": lambda m: m,
    "a quarter turn": np.rot90,
    "half a turn": lambda m: np.rot90(m, 2),
    "mirrored": np.fliplr,
    "upside down": np.flipud,
    "transposed": np.transpose,
    "three quarters": lambda m: np.rot90(m, 3),
    "turned and mirrored": lambda m: np.rot90(m)[::-1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_copies_of_a_map_are_never_in_two_parts_however_they_are_turned(generated, view):
    copied = np.random.default_rng(0).choice(len(generated), 25, replace=False)
    maps = turned_copies(generated, copied, VIEWS[view])
    n = len(generated)
    for seed in range(3):
        part = np.empty(len(maps), int)
        for number, members in enumerate(split_by_lot(maps, seed=seed).parts().values()):
            part[members] = number
        assert (part[copied] == part[n:]).all()


def test_digests_are_equal_for_the_eight_views_of_a_map_and_only_for_those():
    rng = np.random.default_rng(0)
    for shape in ((5, 5), (4, 7), (1, 6), (1, 1)):
        one = rng.integers(0, 3, shape, dtype=np.uint8)
        views = [np.ascontiguousarray(view(one)) for view in VIEWS.values()]
        assert len(set(pack_maps(views, np.zeros(8, int), source="views").digests().tolist())) == 1
    flat = np.array([0, 1, 2, 2, 1, 1], np.uint8)
    other = [flat.reshape(1, 6), flat.reshape(2, 3), flat[::-1].reshape(2, 3) * 0, np.roll(flat, 1).reshape(2, 3)]
    assert len(set(pack_maps(other, np.zeros(4, int), source="others").digests().tolist())) == 4


def test_a_digest_is_the_same_whatever_maps_are_beside_it_and_whenever_it_is_made(generated):
    digests = generated.digests()
    assert digests.dtype == np.uint64 and digests.shape == (len(generated),)
    assert generated.digests() is digests
    some = np.array([5, 300, 17])
    assert np.array_equal(generated.select(some).digests(), digests[some])
    known = pack_maps([np.array([[0, 1, 2], [1, 2, 2]], np.uint8)], np.zeros(1, int), source="known")
    assert known.digests().tolist() == [17365168266859899210]  # kept with registered models: must not change


def test_the_same_seed_gives_the_same_split_and_another_seed_another(generated):
    first, again, other = (split_by_lot(generated, seed=s) for s in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert np.array_equal(first.test, again.test)
    assert first.fingerprint != other.fingerprint


def test_one_changed_die_changes_the_fingerprint(generated):
    flat = generated.maps_flat.copy()
    at = np.flatnonzero(flat == 1)[0]
    flat[at] = 2
    changed = pack_maps(
        [
            flat[a:b].reshape(s)
            for a, b, s in zip(generated.offsets[:-1], generated.offsets[1:], generated.shapes, strict=True)
        ],
        generated.labels,
        groups=generated.groups,
        source="changed",
    )
    assert split_by_lot(changed, seed=0).fingerprint != split_by_lot(generated, seed=0).fingerprint


def test_two_labels_of_a_lot_that_change_places_change_the_fingerprint(generated):
    """The deal sees how many maps of each class a lot has, so it is the same."""
    one = 0
    other = np.flatnonzero((generated.groups == generated.groups[one]) & (generated.labels != generated.labels[one]))[0]
    labels = generated.labels.copy()
    labels[[one, other]] = labels[[other, one]]
    before, after = split_by_lot(generated), split_by_lot(replace(generated, labels=labels))
    assert np.array_equal(before.test, after.test)
    assert before.fingerprint != after.fingerprint


def test_a_class_that_the_data_lack_is_named_not_refused(generated):
    without = generated.select(np.flatnonzero(generated.labels != CLASS_NAMES.index("Donut")))
    split = split_by_lot(without)
    assert split.notes == ("Donut: no map in these data. The class is left out of the answers and the scores.",)
    shares = np.delete(shares_of(without, split), CLASS_NAMES.index("Donut"), axis=1)
    assert np.abs(shares - [[0.70], [0.15], [0.15]]).max() < 0.0501


@pytest.mark.parametrize(
    ("labels", "lots", "message"),
    [
        ([0] * 12, range(12), r"1 class\(es\) in 12 lot"),
        ([0, 1] * 6, [0, 1] * 6, r"2 class\(es\) in 2 lot"),
        (range(9), range(9), "the only one of some class"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(labels, lots, message):
    with pytest.raises(DataError, match=message):
        split_by_lot(made_up(np.array(labels), np.array(lots)))


# In order


def in_order(n_lots=50, maps_a_lot=20, *, seed=0):
    """Nine classes in every lot; lots are numbered from 7 and lie in no order."""
    lots = np.random.default_rng(seed).permutation(np.repeat(7 + np.arange(n_lots), maps_a_lot))
    return made_up(np.random.default_rng(seed + 1).integers(0, 9, len(lots)), lots, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_in_order_the_last_fifth_of_the_lots_is_the_test_part_and_only_the_others_are_dealt(seed):
    maps = in_order()
    split = split_in_order(maps, seed=seed)
    lots = [set(maps.groups[part]) for part in split.parts().values()]
    assert lots[2] == set(range(47, 57)) and lots[0] | lots[1] == set(range(7, 47)) and not lots[0] & lots[1]
    assert sorted(np.concatenate(list(split.parts().values()))) == list(range(len(maps)))
    assert len(split.train) >= 0.6 * len(maps) and len(split.validation) >= 0.1 * len(maps)
    assert (shares_of(maps, split) > 0).all()
    (note,) = split.notes
    assert note.startswith("Test: the last 10 of 50 lots, 20% of the maps; none of them lies before")
    assert all((np.diff(part) > 0).all() for part in split.parts().values())


def test_in_order_the_seed_deals_the_earlier_lots_and_the_test_part_stays():
    maps = in_order()
    first, again, other = (split_in_order(maps, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(first.test, other.test) and not np.array_equal(first.validation, other.validation)
    assert first.fingerprint == split_maps(maps, how="ordered").fingerprint != split_maps(maps).fingerprint
    assert split_maps(maps).fingerprint == split_by_lot(maps).fingerprint


@pytest.mark.parametrize("view", VIEWS)
def test_in_order_earlier_copies_of_test_maps_are_in_no_part_and_counted(view):
    maps = in_order()
    early, late = np.flatnonzero(maps.groups < 47), np.flatnonzero(maps.groups >= 47)
    copied = [maps[i] for i in range(len(maps))]
    for one, other in zip(early[:12], late[:12], strict=True):
        copied[one] = np.ascontiguousarray(VIEWS[view](maps[other]))
    perfect = np.ones((6, 6), np.uint8)  # a copy of itself by nature, in early and late lots
    copied[early[20]] = copied[late[20]] = perfect
    maps = pack_maps(copied, maps.labels, groups=maps.groups, source="with copies")
    split = split_in_order(maps)
    kept = np.concatenate([split.train, split.validation])
    assert sorted(np.setdiff1d(early, kept)) == sorted(early[:12]) and np.array_equal(split.test, late)
    assert "12 earlier maps are in no part: the test part has a copy of each." in split.notes


def test_in_order_a_class_that_only_the_last_lots_have_is_named_and_in_no_part():
    maps = in_order()
    labels = np.where((maps.labels == 3) & (maps.groups < 47), 4, maps.labels)
    labels = np.where((labels == 5) & (maps.groups >= 47), 4, labels)
    labels[np.flatnonzero(labels == 6)] = 7
    split = split_in_order(replace(maps, labels=labels))
    late = (labels == 3).sum()
    assert f"Edge-Ring: its {late} maps are in no part, since all come from the last lots or have a" in split.notes[1]
    assert split.notes[2:] == (
        "Near-full: none in test, since lots keep their order.",
        "Random: no map in these data. The class is left out of the answers and the scores.",
    )
    assert not (labels[np.concatenate(list(split.parts().values()))] == 3).any()
    assert len(split.test) == (maps.groups >= 47).sum() - late


def test_in_order_maps_without_a_lot_keep_the_order_of_the_data():
    maps = made_up(np.arange(200) % 4, np.arange(200))
    assert split_in_order(maps).test.tolist() == list(range(160, 200))


def test_in_order_maps_of_unknown_lot_are_in_no_part_and_the_last_known_lots_are_the_test():
    maps = in_order()
    lots = maps.groups.copy()
    hidden = np.flatnonzero(np.random.default_rng(0).random(len(lots)) < 0.2)
    maps.groups[hidden] = -1 - np.arange(len(hidden))
    split = split_in_order(maps)
    assert set(lots[split.test]) == set(range(47, 57))
    assert not np.isin(hidden, np.concatenate(list(split.parts().values()))).any()
    assert any(f"{len(hidden):,} maps of unknown lot are in no part" in note for note in split.notes)
    nameless = made_up(np.arange(200) % 4, -1 - np.arange(200))
    assert split_in_order(nameless).test.tolist() == list(range(160, 200))


def test_in_order_a_training_part_that_is_small_is_told():
    lots = np.concatenate([np.repeat(np.arange(40), 10), np.repeat(np.arange(40, 50), 40)])
    split = split_in_order(made_up(np.arange(800) % 4, lots))
    assert "Test: the last 10 of 50 lots, 50% of the maps" in split.notes[0]
    assert split.notes[-1].startswith(f"Training has {len(split.train) / 800:.1%} of all maps, less than 60%")


def test_what_cannot_be_split_in_order_is_refused_with_the_reason():
    with pytest.raises(DataError, match="the last 10 lots have no class that earlier ones have"):
        split_in_order(made_up(np.where(np.arange(50) < 40, np.arange(50) % 2, 5), np.arange(50)))
    with pytest.raises(DataError, match="1 class"):
        split_in_order(made_up((np.arange(50) >= 40).astype(int), np.arange(50)))


def test_folds_hold_each_map_once_and_share_no_lot_or_copy_with_what_is_trained_on(generated):
    turned = [np.rot90(generated[i]) for i in range(len(generated)) if i % 40 == 0]  # copies in other lots
    of_turned = np.arange(0, len(generated), 40)
    maps = pack_maps(
        [*(generated[i] for i in range(len(generated))), *turned],
        np.concatenate([generated.labels, generated.labels[of_turned]]),
        groups=np.concatenate([generated.groups, generated.groups.max() + 1 + np.arange(len(turned))]),
        source="with copies",
    )
    splits = split_into_folds(maps, folds=3, seed=0)
    assert sorted(np.concatenate([split.test for split in splits])) == list(range(len(maps)))
    for split in splits:
        parts = list(split.parts().values())
        assert sorted(np.concatenate(parts)) == list(range(len(maps)))
        for one, other in itertools.combinations(parts, 2):
            assert not {*maps.groups[one]} & {*maps.groups[other]}
            assert not {*maps.digests()[one]} & {*maps.digests()[other]}
        assert np.abs(shares_of(maps, split)[2] - 1 / 3).max() < 0.15
    assert len({split.fingerprint for split in splits}) == 3
    again = split_into_folds(maps, folds=3, seed=0)
    assert [split.fingerprint for split in again] == [split.fingerprint for split in splits]


@pytest.mark.parametrize("folds", [1, 7])
def test_folds_that_cannot_be_had_are_refused_with_the_reason(folds):
    maps = made_up(np.arange(12) % 2, np.arange(12) // 2)
    with pytest.raises(DataError, match=f"{folds} folds of 6 lots"):
        split_into_folds(maps, folds=folds)

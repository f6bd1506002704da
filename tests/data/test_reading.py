"""Promises about reading, splitting and serving wafer maps."""

import io
import itertools
import os
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from waferlab.data.datamodule import EpochBatches, WaferMapDataModule
from waferlab.data.images import augment, encode, resize_maps, symmetries
from waferlab.data.maps import CLASS_NAMES, pack_maps
from waferlab.data.reading import MIXEDWM38_COLUMNS, load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.deployment.onnx_export import export_onnx
from waferlab.deployment.predictor import OnnxClassifier
from waferlab.errors import DataError


@pytest.fixture(scope="module")
def generated():
    return load_wafer_maps(samples_per_class=60, seed=1)


def save(tmp_path, **arrays):
    path = tmp_path / "maps.npz"
    np.savez(path, **arrays)
    return path


# --- reading


def test_our_layout_is_read_back_map_by_map(tiny_npz, tiny_arrays):
    maps = load_wafer_maps(tiny_npz)
    offsets, shapes = tiny_arrays["offsets"], tiny_arrays["shapes"]
    for i in (0, 7, len(maps) - 1):
        expected = tiny_arrays["maps_flat"][offsets[i] : offsets[i + 1]].reshape(shapes[i])
        assert np.array_equal(maps[i], expected)
        assert CLASS_NAMES[maps.labels[i]] == tiny_arrays["labels"][i]
    assert np.array_equal(maps.groups, tiny_arrays["group"])


def test_dense_layout_is_read_and_each_map_is_its_own_lot(tmp_path):
    dense = np.random.default_rng(0).integers(0, 3, (18, 12, 10), dtype=np.uint8)
    maps = load_wafer_maps(save(tmp_path, maps=dense, labels=np.array(CLASS_NAMES * 2)))
    assert np.array_equal(np.stack([maps[i] for i in range(18)]), dense)
    assert len(set(maps.groups)) == 18


def test_mixedwm38_keeps_single_and_defect_free_maps_and_says_what_it_left_out(tmp_path):
    dense = np.ones((11, 8, 8), dtype=np.int32)
    columns = np.zeros((11, 8), dtype=np.int32)
    columns[np.arange(8), np.arange(8)] = 1  # one of each pattern; 8 and 9 defect-free; 10 a mixture
    columns[10, :2] = 1
    dense[9, 0, 0] = 3
    maps = load_wafer_maps(save(tmp_path, arr_0=dense, arr_1=columns))
    names = [CLASS_NAMES[label] for label in maps.labels]
    assert names == [*MIXEDWM38_COLUMNS, "none"]
    assert "left out: 1 mixed, 1 with die values other than 0 to 2" in maps.notes[0]


@pytest.mark.parametrize(
    ("levels", "pixels", "expected"),
    [
        ("auto", [[0, 128, 255], [120, 130, 250]], [[0, 1, 2], [1, 1, 2]]),
        ("auto", [[0, 0, 255], [0, 255, 0]], "binary"),
        ("binary", [[0, 128, 255], [0, 0, 255]], "binary"),
    ],
)
def test_images_are_read_in_two_or_three_levels_and_the_note_says_which(tmp_path, levels, pixels, expected):
    for name in CLASS_NAMES:
        (tmp_path / name).mkdir()
        Image.fromarray(np.array(pixels, dtype=np.uint8)).save(tmp_path / name / "a.png")
    maps = load_wafer_maps(tmp_path, image_levels=levels)
    assert maps.class_counts.tolist() == [1] * 9
    if expected == "binary":
        assert "two levels" in maps.notes[0]
        assert np.array_equal(maps[0] == 2, np.array(pixels) >= 128)
    else:
        assert "three grey levels" in maps.notes[0]
        assert maps[0].tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": lambda a: np.where(a == "none", "nothing", a)}, "unknown label 'nothing'"),
        ({"maps_flat": lambda a: np.where(a == 2, 7, a).astype(np.uint8)}, "die value 7"),
        ({"maps_flat": lambda a: a.astype(np.float32)}, "float32, not uint8"),
        ({"shapes": lambda a: a[:-1]}, "shapes"),
        ({"shapes": lambda a: a + 1}, "offsets do not fit"),
        ({"labels": lambda a: np.arange(len(a))}, "Expected class names"),
        ({"group": lambda a: a[:-3]}, "group is int32"),
        ({"group": lambda a: a.astype(complex)}, "group is complex128"),
        ({"shapes": lambda a: a * 1.0}, "shapes are float64, not whole numbers"),
    ],
)
def test_damaged_arrays_get_an_error_that_names_the_value(tmp_path, tiny_arrays, change, message):
    arrays = dict(tiny_arrays)
    for key, edit in change.items():
        arrays[key] = edit(arrays[key])
    with pytest.raises(DataError, match=message):
        load_wafer_maps(save(tmp_path, **arrays))


def test_an_npz_with_a_pickle_inside_is_refused_and_the_pickle_does_not_run(tmp_path):
    proof = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    path = save(tmp_path, maps=np.array([Hostile()], dtype=object), labels=np.array(["none"]))
    with pytest.raises(DataError, match="without pickles"):
        load_wafer_maps(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("lots", "expected"),
    [
        (np.array(["A7", "A7", "B1", "a7", "B1"]), [0, 0, 1, 2, 1]),
        (np.array(["Lös", "Lös", "B1", "?", "B1"]), [0, 0, 1, 2, 1]),
        (np.array([b"A7", b"A7", b"\xff", b"a7", b"\xff"]), [0, 0, 1, 2, 1]),
        (np.array([2.5, 2.5, 2.7, 2.0, 2.7]), [0, 0, 1, 2, 1]),
        (np.array([1e300, 1e300, 2e300, np.inf, 2e300]), [0, 0, 1, 2, 1]),
        (np.array([2**63, 2**63, 2**63 + 1, 5, 2**63 + 1], dtype=np.uint64), [0, 0, 1, 2, 1]),
        (np.array([np.nan, 3, np.nan, np.nan, 3]), [0, 1, 2, 3, 1]),
        (np.array(["", "x", " ", "", "x"]), [0, 1, 2, 3, 1]),
        (np.array([b"", b"x", b"", b"", b"x"]), [0, 1, 2, 3, 1]),
    ],
)
def test_lots_have_any_name_and_unknown_ones_are_lots_of_their_own(tmp_path, lots, expected):
    dense = np.ones((5, 3, 3), np.uint8)
    maps = load_wafer_maps(save(tmp_path, maps=dense, labels=np.array(CLASS_NAMES[:5]), group=lots))
    same = maps.groups[:, None] == maps.groups
    assert np.array_equal(same, np.equal.outer(expected, expected))
    assert any("unknown lot" in note for note in maps.notes) == (expected == [0, 1, 2, 3, 1])


@pytest.mark.parametrize("kind", ["int16", "uint64", "float32"])
def test_lots_that_are_whole_numbers_keep_them(tmp_path, kind):
    lots = np.array([7, 7, 90, 4, 90]).astype(kind)
    path = save(tmp_path, maps=np.ones((5, 3, 3), np.uint8), labels=np.array(CLASS_NAMES[:5]), group=lots)
    assert load_wafer_maps(path).groups.tolist() == [7, 7, 90, 4, 90]


def test_class_names_may_be_bytes_and_foreign_ones_are_shown(tmp_path):
    dense = np.ones((9, 3, 3), np.uint8)
    maps = load_wafer_maps(save(tmp_path, maps=dense, labels=np.array(CLASS_NAMES).astype("S")))
    assert maps.labels.tolist() == list(range(9))
    with pytest.raises(DataError, match=r"unknown label b'Caf\\xe9'"):
        load_wafer_maps(save(tmp_path, maps=dense, labels=np.array([b"Caf\xe9"] * 9)))


@pytest.mark.parametrize(
    ("maps", "labels"),
    [
        (np.full((9, 5, 5), np.nan), np.eye(9, 8, dtype=int)),
        (np.full((9, 5, 5), 1.9), np.eye(9, 8, dtype=int)),
        (np.ones((9, 5, 5), int), np.eye(9, 8) * 0.5),
        (np.ones((9, 5, 5), int), np.full((9, 8), np.nan)),
    ],
)
def test_mixedwm38_with_fractions_is_refused_rather_than_rounded(tmp_path, maps, labels):
    with pytest.raises(DataError, match="Die values are whole numbers"):
        load_wafer_maps(save(tmp_path, arr_0=maps, arr_1=labels))


def test_negative_dies_of_mixedwm38_are_left_out_like_those_above_2(tmp_path):
    dense = np.ones((9, 5, 5), int)
    dense[3, 0, 0] = -1
    maps = load_wafer_maps(save(tmp_path, arr_0=dense, arr_1=np.eye(9, 8, dtype=int)))
    assert len(maps) == 8 and "1 with die values other" in maps.notes[0]


def npz_that_says(path, shape, content, *, dtype="|u1", version=1):
    """A zip with an array `maps` whose header declares `shape`, followed by the bytes `content`; and labels."""
    member = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    (np.lib.format.write_array_header_1_0 if version == 1 else np.lib.format.write_array_header_2_0)(member, header)
    labels = io.BytesIO()
    np.save(labels, np.array(["none"]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("maps.npy", member.getvalue() + content)
        archive.writestr("labels.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    ("shape", "content", "more"),
    [
        ((1, 10**5, 10**5), b"", {}),
        ((10**15,), b"", {}),
        ((1, 2, 2), b"12345678", {}),
        ((-1, 10**9), b"", {}),
        ((10**12,), b"", {"dtype": "<U0"}),
        ((1, 2, 2), b"1234", {"version": 2}),
    ],
)
def test_an_npz_that_declares_what_it_does_not_hold_is_refused_before_memory_is_taken(tmp_path, shape, content, more):
    path = npz_that_says(tmp_path / "x.npz", shape, content, **more)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"x\.npz: (array 'maps' declares|cannot be read)"):
        load_wafer_maps(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_npz_that_inflates_far_beyond_its_size_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    path = npz_that_says(tmp_path / "x.npz", (1, 2**12, 2**12), bytes(2**24))
    monkeypatch.setattr("waferlab.data.npz.ALWAYS_ALLOWED", 2**20)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"inflate to 16,7\d\d,\d\d\d; at most .* 200 times the file"):
        load_wafer_maps(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_arrays_that_are_not_ours_are_not_read(tmp_path, tiny_arrays):
    path = save(tmp_path, **tiny_arrays, remarks=np.array([{"by": "hand"}], dtype=object))
    assert len(load_wafer_maps(path)) == len(tiny_arrays["labels"])


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_gets_a_clear_error(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        load_wafer_maps(tmp_path / "bad.npz")


def test_a_missing_path_and_an_unknown_kind_of_file_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_wafer_maps(tmp_path / "nowhere.npz")
    (tmp_path / "maps.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"unknown kind of file '\.csv'"):
        load_wafer_maps(tmp_path / "maps.csv")


def test_unknown_class_folders_and_broken_images_are_named(tmp_path):
    (tmp_path / "Spiral").mkdir()
    with pytest.raises(DataError, match="'Spiral'"):
        load_wafer_maps(tmp_path)
    (tmp_path / "Spiral").rename(tmp_path / "edge_ring")
    (tmp_path / "edge_ring" / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png: not a readable image"):
        load_wafer_maps(tmp_path)


def test_at_most_so_many_of_each_class_are_kept(tiny_npz):
    maps = load_wafer_maps(tiny_npz, max_samples_per_class=5)
    assert maps.class_counts.tolist() == [5] * 9
    assert "At most 5" in maps.notes[-1]


# --- splitting


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


# --- batches


def test_resizing_keeps_the_three_levels_of_a_map_that_has_the_size_already():
    die_map = np.random.default_rng(0).integers(0, 3, (32, 32), dtype=np.uint8)
    images = resize_maps(pack_maps([die_map], np.array([0]), source="one"), 32)
    assert torch.equal(images[0, 0], torch.from_numpy(die_map) * 127)


def test_a_thin_scratch_on_a_large_map_does_not_vanish():
    die_map = np.ones((200, 200), dtype=np.uint8)
    die_map[:, 101] = 2
    images = encode(resize_maps(pack_maps([die_map], np.array([7]), source="one"), 48))
    column_of_scratch = images[0, 0].max(dim=1).values
    assert (column_of_scratch > 0.05).all()


def exact_levels(die_map, size):
    """Bilinear with antialiasing in whole numbers: no step rounds but the last, which rounds halves up."""

    def weights(n):
        pixels, dies = (2 * np.arange(size) + 1) * n, (2 * np.arange(n) + 1) * size
        return np.maximum(0, 2 * max(n, size) - np.abs(pixels[:, None] - dies)).astype(object)

    rows, columns = (weights(n) for n in die_map.shape)
    whole = rows.sum(1)[:, None] * columns.sum(1)
    return (2 * 127 * (rows @ die_map.astype(object) @ columns.T) + whole) // (2 * whole)


@pytest.mark.parametrize("shape", [(25, 27), (39, 31), (20, 60), (107, 150), (212, 204), (1, 7)])
def test_resizing_is_exact_and_rounds_halves_up(shape):
    die_maps = np.random.default_rng(0).integers(0, 3, (3, *shape), dtype=np.uint8)
    images = resize_maps(pack_maps(list(die_maps), np.zeros(3, int), source="some"), 40)
    for image, die_map in zip(images, die_maps, strict=True):
        assert np.array_equal(image[0].numpy(), exact_levels(die_map, 40).astype(np.uint8))


def test_resizing_is_bilinear_with_antialiasing():
    die_map = np.random.default_rng(0).integers(0, 3, (61, 47), dtype=np.uint8)
    images = resize_maps(pack_maps([die_map], np.zeros(1, int), source="one"), 40)
    levels = torch.from_numpy(die_map)[None, None].double() * 127
    wanted = torch.nn.functional.interpolate(levels, size=(40, 40), mode="bilinear", antialias=True)
    assert (images.double() - wanted).abs().max() <= 0.5 + 1e-6


class GreyLevels(torch.nn.Module):
    """A network that passes its picture on, so that no grey level can differ unnoticed."""

    def forward(self, images):
        return images.flatten(1) * 10


@pytest.fixture(scope="module")
def file_of_grey_levels(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "m.onnx"
    return OnnxClassifier(export_onnx(GreyLevels(), path, image_size=24, class_names=["pixel"] * 24 * 24))


def test_a_file_resizes_maps_exactly_as_training_does(generated, file_of_grey_levels):
    some = generated.select(np.arange(0, len(generated), 6))
    answered = file_of_grey_levels.predict([some[i] for i in range(len(some))])
    expected = GreyLevels()(encode(resize_maps(some, 24))).softmax(-1).numpy()
    np.testing.assert_allclose(answered, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_map_without_a_die_is_refused_by_reading_and_by_a_file(tmp_path, shape, file_of_grey_levels):
    with pytest.raises(DataError, match=f"a map of {shape[0]}x{shape[1]} dies"):
        load_wafer_maps(save(tmp_path, maps=np.zeros((9, *shape), np.uint8), labels=np.array(CLASS_NAMES)))
    with pytest.raises(ValueError, match=r"map 1 is .* without a die"):
        file_of_grey_levels.predict([np.ones((4, 4), np.uint8), np.zeros(shape, np.uint8)])


def test_the_order_of_maps_survives_resizing_by_size(generated):
    images = resize_maps(generated, 24)
    for i in (0, 100, 333):
        alone = resize_maps(generated.select(np.array([i])), 24)
        assert torch.equal(images[i], alone[0])


def test_augmentation_draws_only_the_eight_symmetries_and_light_noise():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 6, 6) * -0.9 - 0.05  # below 0 there is no die, so no noise
    views = {view.numpy().tobytes() for view in symmetries(image)}
    assert len(views) == 8
    drawn = {a.unsqueeze(0).numpy().tobytes() for a in augment(image.expand(400, 1, 6, 6).contiguous())}
    assert drawn == views
    noisy = augment(torch.zeros(200, 1, 40, 40))
    assert 0.005 < noisy.mean() < 0.02


def test_a_resumed_epoch_sees_the_same_batches():
    batches = EpochBatches(100, batch_size=8, shuffle=True, seed=3)
    batches.set_epoch(4)
    first = [b.tolist() for b in batches]
    resumed = EpochBatches(100, batch_size=8, shuffle=True, seed=3)
    resumed.set_epoch(4)
    assert [b.tolist() for b in resumed] == first
    resumed.set_epoch(5)
    assert [b.tolist() for b in resumed] != first


def test_evaluation_batches_hold_every_map_once_in_order():
    batches = list(EpochBatches(100, batch_size=64, shuffle=False))
    assert torch.cat(batches).tolist() == list(range(100))


def test_balancing_weighs_by_inverse_square_root_and_drops_nothing(generated):
    scratch, none = CLASS_NAMES.index("Scratch"), CLASS_NAMES.index("none")
    keep = np.flatnonzero((generated.labels != scratch) | (np.arange(len(generated)) % 3 == 0))
    maps = generated.select(keep)
    split = split_by_lot(maps, seed=0)
    data = WaferMapDataModule(maps, split, image_size=16, balancing="loss")
    counts = np.bincount(maps.labels[split.train], minlength=9)
    weights = np.array(data.class_weights)
    assert weights[scratch] / weights[none] == pytest.approx((counts[none] / counts[scratch]) ** 0.5, rel=1e-4)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-4)
    assert len(data.train_dataloader().dataset) == len(split.train)
    sampled = WaferMapDataModule(maps, split, image_size=16)
    assert sampled.class_weights is None
    loader = sampled.train_dataloader()
    drawn = []
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        drawn.append(loader.dataset.labels[torch.cat(list(loader.sampler))])
    share = (torch.cat(drawn) == scratch).float().mean().item()
    assert 1.4 < share / (counts[scratch] / counts.sum()) < 2.2  # sqrt(45 / 13) = 1.86 against a common class


@pytest.mark.parametrize("balancing", ["loss", "sampler"])
def test_balancing_copes_with_a_class_that_training_lacks(generated, balancing):
    maps = generated.select(np.flatnonzero(generated.labels != CLASS_NAMES.index("Donut")))
    data = WaferMapDataModule(maps, split_by_lot(maps), image_size=16, balancing=balancing)
    weights = torch.tensor(data.class_weights or [0.0])
    assert torch.isfinite(weights).all() and weights[0 if balancing == "sampler" else CLASS_NAMES.index("Donut")] == 0
    drawn = torch.cat([labels for _, labels in data.train_dataloader()])
    assert len(drawn) > 0 and CLASS_NAMES.index("Donut") not in drawn

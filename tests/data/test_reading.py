"""Promises about reading wafer maps: each layout as it was written, nothing run, what is odd is named."""

import io
import os
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import MIXEDWM38_COLUMNS, get_tutorial_dataset, load_wafer_maps
from waferlab.errors import DataError


def save(tmp_path, **arrays):
    path = tmp_path / "maps.npz"
    np.savez(path, **arrays)
    return path


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
    assert len(set(maps.groups)) == 18 and maps.notes == ("No group in the file: each map is a lot of its own.",)


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


GREY = np.array([[0, 128, 255], [255, 128, 0]], np.uint8)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.fromarray(GREY // 127), "brightest pixel is 2 of 255, as of die values that were kept as they are"),
        (Image.fromarray(np.stack([GREY, 255 - GREY, GREY], axis=2)), "is in colours"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "its pixels are of the kind I;16"),
        (Image.fromarray(GREY).convert("CMYK"), "its pixels are of the kind CMYK"),
    ],
)
def test_an_image_that_would_be_read_as_something_else_is_refused_with_the_remedy(picture, message, tmp_path):
    (tmp_path / "donut").mkdir()
    picture.save(tmp_path / "donut" / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif: .*{message}.*Save it in grey, 8 bits a pixel: 0 no die, 128 pass"):
        load_wafer_maps(tmp_path)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "P"])
def test_a_grey_image_is_read_whichever_way_it_is_kept(kind, tmp_path):
    (tmp_path / "donut").mkdir()
    Image.fromarray(GREY).convert(kind).save(tmp_path / "donut" / "a.png")
    assert load_wafer_maps(tmp_path)[0].tolist() == [[0, 1, 2], [2, 1, 0]]


@pytest.mark.parametrize("error", [MemoryError("too large"), PermissionError(13, "Permission denied")])
def test_what_the_machine_refuses_is_no_fault_of_the_file(error, tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise error

    np.savez(tmp_path / "maps.npz", maps=np.ones((9, 3, 3), np.uint8), labels=np.array(CLASS_NAMES))
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(type(error), match=str(error.args[-1])):
        load_wafer_maps(tmp_path / "maps.npz")


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
        ({"maps_flat": lambda a: a[:, None]}, "maps_flat is"),
        ({"maps_flat": lambda a: a[0]}, "maps_flat is"),
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
    assert (maps.groups < 0).sum() == (3 if expected == [0, 1, 2, 3, 1] else 0)


def test_lots_with_numbers_below_zero_are_numbered_as_those_without_one_have_them(tmp_path):
    path = save(tmp_path, maps=np.ones((4, 3, 3), np.uint8), labels=np.array(CLASS_NAMES[:4]), group=[-5, 3, -5, 9])
    assert load_wafer_maps(path).groups.tolist() == [0, 1, 0, 2]


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
    size = (60_000).to_bytes(4, "big") * 2  # in pixels, which an image of a few bytes may say of itself
    header = b"IHDR" + size + bytes([8, 0, 0, 0, 0])
    start = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "edge_ring" / "x.png").write_bytes(start + bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))
    with pytest.raises(DataError, match=r"x\.png: not a readable image .*bomb"):
        load_wafer_maps(tmp_path)


def test_at_most_so_many_of_each_class_are_kept(tiny_npz):
    maps = load_wafer_maps(tiny_npz, max_samples_per_class=5)
    assert maps.class_counts.tolist() == [5] * 9
    assert "At most 5" in maps.notes[-1]


def test_the_tutorials_maps_are_so_many_of_each_class_the_same_each_time():
    maps = get_tutorial_dataset(max_samples_per_class=12)
    assert maps.class_counts.tolist() == [12] * 9
    assert np.array_equal(maps.maps_flat, get_tutorial_dataset(12).maps_flat)
    assert not np.array_equal(maps.digests(), get_tutorial_dataset(12, seed=1).digests())
    assert get_tutorial_dataset().class_counts.tolist() == [50] * 9

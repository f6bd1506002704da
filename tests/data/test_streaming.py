"""Promises about maps that stream: the same maps as in memory, of every source, in bounded memory, damage is named."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from waferlab.data import streaming
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import MIXEDWM38_COLUMNS, load_wafer_maps
from waferlab.data.streaming import MapStream, stream_wafer_maps
from waferlab.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(streaming, "MAPS_AT_ONCE", 7)


def save(path, *, squeeze=False, **arrays):
    (np.savez_compressed if squeeze else np.savez)(path, **arrays)
    return path


def gather(source):
    """All chunks of a source or a stream, joined: ids, maps, lots, labels."""
    chunks = list(source if isinstance(source, MapStream) else stream_wafer_maps(source))
    return tuple(
        [one for chunk in chunks for one in getattr(chunk, part)] for part in ("ids", "maps", "lots", "labels")
    )


def images(folder, number=20):
    rng = np.random.default_rng(0)
    for i in range(number):
        (folder / CLASS_NAMES[i % 9]).mkdir(parents=True, exist_ok=True)
        grey = np.array([0, 128, 255], np.uint8)[rng.integers(0, 3, (6 + i % 3, 9))]
        Image.fromarray(grey).save(folder / CLASS_NAMES[i % 9] / f"{i:03}.png")
    return folder


def dense(n=30):
    return np.random.default_rng(1).integers(0, 3, (n, 8, 9), dtype=np.uint8)


SOURCES = {
    "synthetic": lambda folder, arrays: "synthetic",
    "flat": lambda folder, arrays: save(folder / "a.npz", **arrays),
    "flat, compressed": lambda folder, arrays: save(folder / "a.npz", squeeze=True, **arrays),
    "dense": lambda folder, arrays: save(
        folder / "a.npz", maps=dense(), labels=np.array(CLASS_NAMES)[np.arange(30) % 9]
    ),
    "dense, by columns": lambda folder, arrays: save(
        folder / "a.npz", maps=np.asfortranarray(dense()), labels=np.array(["none"] * 30)
    ),
    "MixedWM38": lambda folder, arrays: save(
        folder / "a.npz", arr_0=dense().astype(np.int32), arr_1=np.eye(9, 8, dtype=np.int32)[np.arange(30) % 9]
    ),
    "class folders": lambda folder, arrays: images(folder / "images"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_streams_the_same_maps_labels_and_lots_as_it_has_in_memory(kind, tmp_path, tiny_arrays):
    source = SOURCES[kind](tmp_path, tiny_arrays)
    whole = load_wafer_maps(source)
    stream = stream_wafer_maps(source)
    ids, maps, lots, labels = gather(stream)
    assert stream.total == len(maps) == len(whole) and len(set(ids)) == len(ids)
    assert all(np.array_equal(one, whole[i]) for i, one in enumerate(maps))
    assert labels == [CLASS_NAMES[label] for label in whole.labels]
    assert set(stream.label_names()) == set(labels)
    of_their_own = kind == "synthetic" or kind.startswith("flat")
    assert lots == (list(map(str, whole.groups)) if of_their_own else [""] * len(maps))


def test_the_first_chunk_is_one_map_and_a_stream_can_be_read_again(tiny_npz):
    stream = stream_wafer_maps(tiny_npz)
    sizes = [len(chunk.maps) for chunk in stream]
    assert sizes[0] == 1 and set(sizes[1:-1]) == {7} and sum(sizes) == stream.total
    assert [len(chunk.maps) for chunk in stream] == sizes


def test_large_maps_come_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "DIES_AT_ONCE", 200)
    for source in (save(tmp_path / "a.npz", maps=dense()), images(tmp_path / "images")):
        chunks = list(stream_wafer_maps(source))
        assert max(len(chunk.maps) for chunk in chunks) < 7
        assert max(sum(one.size for one in chunk.maps) for chunk in chunks) < 200 + 72


def test_labels_and_lots_need_not_be_known(tmp_path, tiny_arrays):
    bare = {name: tiny_arrays[name] for name in ("maps_flat", "offsets", "shapes")}
    for arrays in (bare, {"maps": dense()}, {"arr_0": dense()}):
        stream = stream_wafer_maps(save(tmp_path / "bare.npz", **arrays))
        assert stream.label_names() == ()
        chunk = next(iter(stream))
        assert (chunk.ids, chunk.lots, chunk.labels) == (["0"], [""], [""])


def test_lots_keep_their_names_and_rows_are_the_ids(tmp_path):
    lots = np.array(["A7", " B1 ", "", "A7"])
    ids, _, names, _ = gather(save(tmp_path / "a.npz", maps=dense(4), group=lots, row=np.array([9, 4, 7, 1])))
    assert names == ["A7", "B1", "", "A7"] and ids == ["9", "4", "7", "1"]
    assert gather(save(tmp_path / "a.npz", maps=dense(3), group=np.array([3.0, np.nan, 2.5])))[2] == ["3", "", "2.5"]


def test_all_of_mixedwm38_is_read_but_maps_with_other_die_values(tmp_path):
    maps, columns = dense(9).astype(np.int64), np.zeros((9, 8), np.int64)
    columns[0, 2], columns[1, :2], maps[4, 0, 0], maps[5, 3, 3] = 1, 1, 3, -1
    source = save(tmp_path / "a.npz", arr_0=maps, arr_1=columns)
    ids, found, _, labels = gather(source)
    assert ids == ["0", "1", "2", "3", "6", "7", "8"]
    assert labels == [MIXEDWM38_COLUMNS[2], "", *["none"] * 5]
    assert np.array_equal(np.stack(found), np.delete(maps, (4, 5), axis=0))
    assert sum(chunk.left_out for chunk in stream_wafer_maps(source)) == 2


def test_images_stream_from_a_flat_folder_from_class_folders_and_alone(tmp_path):
    folder = images(tmp_path / "images")
    ids, maps, _, labels = gather(folder)
    (folder / "of lot 7").mkdir()
    (folder / "Center" / "000.png").rename(folder / "alone.png")
    (folder / "Donut" / "001.png").rename(folder / "of lot 7" / "001.png")
    assert dict(zip(*(gather(folder)[i] for i in (0, 3)), strict=True)) == {
        **{
            one: label for one, label in zip(ids, labels, strict=True) if one not in ("Center/000.png", "Donut/001.png")
        },
        "alone.png": "",
        "of lot 7/001.png": "of lot 7",
    }
    one = gather(folder / "alone.png")
    assert one[0] == ["alone.png"] and np.array_equal(one[1][0], maps[ids.index("Center/000.png")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps_flat": lambda a: np.where(a == 2, 7, a).astype(np.uint8)}, "map 0 has the die value 7"),
        ({"maps_flat": lambda a: a.astype(np.float32)}, "float32, not uint8"),
        ({"shapes": lambda a: a[:-1]}, "Expected maps_flat"),
        ({"shapes": lambda a: a + 1}, "offsets do not fit"),
        ({"shapes": lambda a: a * 0}, "0x0 dies"),
        ({"shapes": lambda a: a * 1.0}, "shapes are float64"),
        ({"shapes": lambda a: a[:0], "offsets": lambda a: a[:1], "maps_flat": lambda a: a[:0]}, "holds no maps"),
        ({"labels": lambda a: np.arange(len(a))}, "Expected 360 class names, or none"),
        ({"labels": lambda a: a[1:]}, "Expected 360 class names, or none"),
        ({"group": lambda a: a[:-3]}, "group is int32"),
        ({"maps_flat": lambda a: a.reshape(1, -1)}, "Expected maps_flat"),
    ],
)
def test_damaged_arrays_get_an_error_that_names_the_value(tmp_path, tiny_arrays, change, message):
    arrays = {key: change.get(key, lambda a: a)(value) for key, value in tiny_arrays.items()}
    with pytest.raises(DataError, match=message):
        gather(save(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"maps": dense().astype(np.int32)}, "maps are int32, not uint8"),
        ({"maps": dense()[0]}, r"maps is \(8, 9\)"),
        ({"maps": np.ones((2, 1, 1025), np.uint8)}, "1x1025 dies"),
        ({"maps": np.array(1, np.uint8)}, "Expected"),
        ({"arr_0": dense(), "arr_1": np.zeros((30, 7), int)}, "arr_1 is int64"),
        ({"arr_0": dense().astype(float)}, "float64, not uint8"),
        ({"labels": np.array(["none"])}, "holds .*labels"),
    ],
)
def test_arrays_of_other_shapes_or_types_are_named(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        gather(save(tmp_path / "a.npz", **arrays))


def test_what_does_not_exist_or_is_no_source_is_named(tmp_path):
    (tmp_path / "maps.csv").write_text("1,2")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "nowhere.npz": "no such file", "maps.csv": r"unknown kind of file '\.csv'", "bad.npz": "cannot be read",
        "bad.png": "not a readable image", "empty": "no images",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message):
            gather(tmp_path / name)


def test_a_pickle_in_the_file_is_refused_and_does_not_run(tmp_path):
    proof = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    for arrays in ({"maps": np.array([Hostile()], object)}, {"maps": dense(), "group": np.array([Hostile()] * 30)}):
        with pytest.raises(DataError, match="without pickles"):
            gather(save(tmp_path / "a.npz", **arrays))
    assert not proof.exists()


def test_sizes_that_are_made_up_and_files_that_inflate_far_are_refused(tmp_path, monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 20, 20)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("maps.npy", header.getvalue() + bytes(400))
    with pytest.raises(DataError, match=r"declares 400,000,1\d\d bytes"):
        stream_wafer_maps(tmp_path / "a.npz")
    monkeypatch.setattr("waferlab.data.npz.ALWAYS_ALLOWED", 2**20)
    with pytest.raises(DataError, match="200 times the file"):
        stream_wafer_maps(save(tmp_path / "a.npz", squeeze=True, maps=np.zeros((4096, 64, 64), np.uint8)))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_maps_before_a_damage_are_given_and_then_it_is_named(tmp_path, method):
    maps, source = io.BytesIO(), tmp_path / "a.npz"
    np.save(maps, np.random.default_rng(0).integers(0, 2, (400, 30, 30), np.uint8))
    with zipfile.ZipFile(source, "w", method, compresslevel=0) as archive:
        archive.writestr("maps.npy", maps.getvalue())
    data = bytearray(source.read_bytes())
    data[len(data) * 3 // 4] ^= 1  # a die that fails no more, which nothing but the check sum can tell
    source.write_bytes(data)
    given = 0
    with pytest.raises(DataError, match="cannot be read"):
        for chunk in stream_wafer_maps(source):
            given += len(chunk.maps)
    assert 0 < given < 400


MEASURE = """
import re, sys
from waferlab.data.streaming import stream_wafer_maps

def megabytes():  # not ru_maxrss, which begins with the memory of whoever started this process
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

before = megabytes()
maps = sum(len(chunk.maps) for chunk in stream_wafer_maps(sys.argv[1]))
print(maps, megabytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="says how much memory a process had, on Linux")
def test_memory_does_not_grow_with_the_file(tmp_path):
    header = {"descr": "|u1", "fortran_order": False, "shape": (300, 1024, 1024)}
    one = np.random.default_rng(0).integers(0, 3, 2**16, np.uint8).tobytes() + bytes(2**20 - 2**16)
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("maps.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(300):
            member.write(one)
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "a.npz"], cwd=ROOT, capture_output=True, text=True)
    maps, megabytes = map(float, done.stdout.split())
    assert maps == 300 and 10 < megabytes < 120

"""What the reader of LSWMD.pkl promises. All files are made here; the real LSWMD.pkl is not needed."""

import builtins
import os
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from waferlab.data import lswmd_pickle
from waferlab.data.lswmd import convert_lswmd, read_lswmd
from waferlab.data.lswmd_pickle import ALLOWED_GLOBALS, UnsafePickleError

MAPS = [
    np.array([[0, 1, 0], [1, 2, 1]], np.uint8),
    np.ones((2, 2), np.uint8),
    np.array([[0, 2], [2, 2], [1, 1]], np.uint8),
    np.zeros((4, 1), np.uint8),
]
LABELS = ["none", "", "Edge-Loc", "Near-full"]  # "": the row has no label
LOTS = ["lot7", "lot7", "lot2", "lot7"]


def nested(texts: list[str]) -> list[np.ndarray]:
    return [np.array([[text]]) if text else np.zeros((0, 0)) for text in texts]


def make_frame(
    *, maps=MAPS, labels=None, lots=LOTS, text_dtype="object", train_column="trianTestLabel"
) -> pd.DataFrame:
    series = {
        "waferMap": pd.Series(maps, dtype=object),
        "dieSize": [float(np.size(wafer)) for wafer in maps],
        "lotName": pd.Series(lots, dtype=text_dtype),
        "waferIndex": np.arange(1.0, len(maps) + 1),
        train_column: pd.Series(nested(["Training", "", "Test", "Test"] * (len(maps) // 4)), dtype=object),
        "failureType": pd.Series(nested(LABELS) if labels is None else labels, dtype=object),
    }
    return pd.DataFrame(series)


def write(folder: Path, content: object, *, protocol: int = 5) -> Path:
    path = folder / "LSWMD.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


def assert_is_the_frame(arrays: dict[str, np.ndarray]) -> None:
    kept = [MAPS[0], MAPS[2], MAPS[3]]
    assert arrays["labels"].tolist() == ["none", "Edge-Loc", "Near-full"]
    assert arrays["row"].tolist() == [0, 2, 3]
    assert arrays["group"].tolist() == [0, 1, 0]
    assert arrays["shapes"].tolist() == [list(wafer.shape) for wafer in kept]
    assert arrays["offsets"].tolist() == [0, 6, 12, 16]
    assert arrays["maps_flat"].tolist() == [die for wafer in kept for die in wafer.ravel()]


# --- What is read ---


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("text_dtype", ["object", "str", "string[python]", "string[pyarrow]"])
def test_a_pickle_of_todays_pandas_is_read_with_every_kind_of_text_column(tmp_path, text_dtype, protocol):
    path = write(tmp_path, make_frame(text_dtype=text_dtype), protocol=protocol)
    assert_is_the_frame(read_lswmd(path))


def test_a_pickle_of_str_columns_without_pyarrow_is_read(tmp_path):
    with pd.option_context("mode.string_storage", "python"):
        path = write(tmp_path, make_frame(text_dtype="str"))
    assert b"pyarrow" not in path.read_bytes().replace(b"ArrowStringArray", b"")
    assert_is_the_frame(read_lswmd(path))


def test_the_arrays_have_the_dtypes_of_our_layout(tmp_path):
    arrays = read_lswmd(write(tmp_path, make_frame()))
    expected = {"maps_flat": "uint8", "offsets": "int64", "shapes": "int16", "group": "int32", "row": "int32"}
    assert {name: array.dtype.name for name, array in arrays.items() if name != "labels"} == expected
    assert arrays["labels"].dtype.kind == "U"


def test_a_map_stored_by_columns_is_read_by_rows(tmp_path):
    assert_is_the_frame(read_lswmd(write(tmp_path, make_frame(maps=[np.asfortranarray(wafer) for wafer in MAPS]))))


def test_maps_of_a_wider_integer_type_become_uint8(tmp_path):
    assert_is_the_frame(read_lswmd(write(tmp_path, make_frame(maps=[wafer.astype(">i4") for wafer in MAPS]))))


def test_both_spellings_of_the_training_column_are_read(tmp_path):
    assert_is_the_frame(read_lswmd(write(tmp_path, make_frame(train_column="trainTestLabel"))))


def test_unlabelled_rows_are_left_out_however_they_are_written(tmp_path):
    for empty in (np.zeros((0, 0)), np.array([]), np.array([[""]]), "", None, float("nan"), [], pd.NA):
        labels = [np.array([["none"]]), empty, "Edge-Loc", ["Near-full"]]
        assert_is_the_frame(read_lswmd(write(tmp_path, make_frame(labels=labels))))


# --- What the file of 2015 looks like: Python 2, protocol 2, modules that are gone, strings of bytes ---


class Python2Pickle:
    """Writes the opcodes that Python 2 wrote. Tuples, lists, dicts, None, bool, int and str (as bytes) suffice."""

    @staticmethod
    def name(module: str, name: str) -> bytes:
        return f"c{module}\n{name}\n".encode()

    def call(self, function: bytes, *arguments) -> bytes:
        return function + self.value(arguments) + b"R"

    def value(self, value) -> bytes:
        match value:
            case bytes():  # already opcodes
                return value
            case bool():
                return b"\x89\x88"[value : value + 1]
            case None:
                return b"N"
            case int():
                return b"J" + struct.pack("<i", value)
            case str():
                raw = value.encode("latin1")
                return b"U" + bytes([len(raw)]) + raw  # SHORT_BINSTRING
            case tuple():
                return b"(" + b"".join(map(self.value, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.value, value)) + b"e"
            case dict():
                return b"}(" + b"".join(self.value(part) for item in value.items() for part in item) + b"u"

    def array(self, array: np.ndarray, elements: list | None = None) -> bytes:
        code = array.dtype.str[1:] if array.dtype != object else "O8"
        dtype = self.call(self.name("numpy", "dtype"), code, 0, 1)
        dtype += self.value((3, array.dtype.str[0], None, None, None, -1, -1, 0)) + b"b"
        made = self.call(self.name("numpy.core.multiarray", "_reconstruct"), self.name("numpy", "ndarray"), (0,), "b")
        content = array.tobytes().decode("latin1") if elements is None else elements
        return made + self.value((1, array.shape, dtype, False, content)) + b"b"

    def objects(self, rows: list[list], *, flat: bool = False) -> bytes:
        elements = [cell for row in rows for cell in row]
        shape = len(elements) if flat else (len(rows), len(rows[0]))
        return self.array(np.empty(shape, object), elements)

    def index(self, columns: list[str]) -> bytes:
        data = {"data": self.objects([columns], flat=True), "name": None}
        new_index = self.name("pandas.indexes.base", "_new_Index")
        return self.call(new_index, self.name("pandas.indexes.base", "Index"), data)

    def frame(self, blocks: list[tuple[list[str], bytes]]) -> bytes:
        names = [name for columns, _ in blocks for name in columns]
        rows = self.call(
            self.name("pandas.indexes.base", "_new_Index"),
            self.name("pandas.indexes.range", "RangeIndex"),
            {"start": 0, "stop": 4, "step": 1, "name": None},
        )
        axes = [self.index(names), rows]
        starts = [0, len(blocks[0][0])]
        described = [
            {"mgr_locs": self.call(self.name("__builtin__", "slice"), at, at + len(columns), 1), "values": values}
            for at, (columns, values) in zip(starts, blocks, strict=True)
        ]
        items = [self.index(columns) for columns, _ in blocks]
        state = (axes, [values for _, values in blocks], items, {"0.14.1": {"axes": axes, "blocks": described}})
        manager = self.name("pandas.core.internals", "BlockManager") + b")\x81" + self.value(state) + b"b"
        frame = self.name("pandas.core.frame", "DataFrame") + b")\x81"
        return b"\x80\x02" + frame + self.value({"_metadata": [], "_typ": "dataframe", "_data": manager}) + b"b."


def old_pickle() -> bytes:
    old = Python2Pickle()
    labels = [old.array(np.array([[text.encode()]]) if text else np.zeros((0, 0))) for text in LABELS]
    maps = [old.array(wafer) for wafer in MAPS]
    text_block = old.objects([maps, LOTS, labels, labels])
    number_block = old.array(np.arange(8.0).reshape(2, 4))
    text_columns = ["waferMap", "lotName", "trianTestLabel", "failureType"]
    return old.frame([(["dieSize", "waferIndex"], number_block), (text_columns, text_block)])


def test_a_python_2_pickle_of_an_old_pandas_is_read(tmp_path):
    content = old_pickle()
    assert content.startswith(b"\x80\x02")
    assert b"cpandas.indexes.base\n_new_Index\n" in content
    assert b"U\x08waferMap" in content
    assert_is_the_frame(read_lswmd(write(tmp_path, content)))


# --- What is refused ---


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_calls(target: str) -> dict[str, Call]:
    touch = f"touch {target}"
    code = f"open({target!r}, 'w')"
    return {
        f"{os.system.__module__}.system": Call(os.system, touch),
        "builtins.eval": Call(builtins.eval, code),
        "builtins.exec": Call(builtins.exec, code),
        "builtins.open": Call(open, target, "w"),
        "builtins.getattr": Call(getattr, "text", "upper"),
        "numpy.save": Call(np.save, target, 1),
        "numpy.load": Call(np.load, target),
        "pandas.read_pickle": Call(pd.read_pickle, target),
        "pandas.eval": Call(pd.eval, "1 + 1"),
    }


@pytest.mark.parametrize("asked", list(hostile_calls("")))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_something_else_is_refused_before_it_runs(tmp_path, asked, protocol):
    target = tmp_path / "was_run.npy"
    path = write(tmp_path, hostile_calls(str(target))[asked], protocol=protocol)
    with pytest.raises(UnsafePickleError, match=r"asks for \S+, which .* run any code .* Get the original") as refusal:
        read_lswmd(path)
    assert asked.split(".")[-1] in str(refusal.value)
    assert not target.exists()


def test_a_pickle_that_asks_for_os_system_is_refused_before_it_runs(tmp_path):
    target = tmp_path / "was_run"
    stream = b"cos\nsystem\n(V" + f"touch {target}".encode() + b"\ntR."
    with pytest.raises(UnsafePickleError, match=r"asks for os\.system"):
        read_lswmd(write(tmp_path, stream))
    assert not target.exists()
    pickle.loads(stream)  # the proof that the stream does what it is feared for
    assert target.exists()


@pytest.mark.parametrize("name", ["ndarray.tofile", "_core.multiarray._reconstruct", "dtype.__class__", "__class__"])
def test_a_dotted_name_does_not_reach_past_an_allowed_one(tmp_path, name):
    stream = b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(UnsafePickleError, match=f"numpy.{name}"):
        read_lswmd(write(tmp_path, stream))


def test_a_persistent_id_is_refused(tmp_path):
    with pytest.raises(UnsafePickleError, match="secret"):
        read_lswmd(write(tmp_path, b"\x80\x02U\x06secretQ."))


def test_nothing_on_the_list_is_the_real_thing_but_a_stand_in_of_one_module():
    assert all(stand_in.__module__ == lswmd_pickle.__name__ for stand_in in ALLOWED_GLOBALS.values())


@pytest.mark.parametrize(("module", "name"), sorted(ALLOWED_GLOBALS))
def test_a_pickle_cannot_change_what_it_names(tmp_path, module, name):
    before = dict(vars(ALLOWED_GLOBALS[module, name]))
    stream = b"\x80\x02" + Python2Pickle.name(module, name) + b"N}U\x07changedK\x01s\x86b."  # BUILD with (None, {...})
    with pytest.raises(ValueError, match="not a complete pickle"):
        read_lswmd(write(tmp_path, stream))
    assert dict(vars(ALLOWED_GLOBALS[module, name])) == before


def test_a_shape_larger_than_its_data_is_refused_without_making_the_array(tmp_path):
    shape, huge = (Python2Pickle().value(sides) for sides in (MAPS[0].shape, (2**31 - 1, 2**31 - 1)))
    assert shape in old_pickle()
    with pytest.raises(ValueError, match="data of another size"):
        read_lswmd(write(tmp_path, old_pickle().replace(shape, huge)))


def in_memo(number: int) -> bytes:
    return b"Nr" + struct.pack("<I", number) + b"."


HUGE = {
    "a long text": b"\x80\x04\x8d" + struct.pack("<Q", 3 * 2**30) + b"N.",
    "many bytes": b"\x80\x04\x8e" + struct.pack("<Q", 3 * 2**30) + b"N.",
    "more bytes than there are": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"N.",
    "a byte array": b"\x80\x05\x96" + struct.pack("<Q", 3 * 2**30) + b"N.",
    "a text with a short length": b"\x80\x02X" + struct.pack("<I", 2**31) + b"N.",
    "bytes of Python 2": b"\x80\x02T" + struct.pack("<I", 2**31 - 1) + b"N.",
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "a place in the memo": b"\x80\x02" + in_memo(2**28),
    "a place in the memo, of three bytes": b"\x80\x02" + in_memo(2**24 - 1),
    "a place in the memo, in a frame": b"\x80\x04\x95" + struct.pack("<Q", 7) + in_memo(2**28),
    "a place in the memo, in digits": b"Np268435456\n.",
    "a place in the memo, in odd digits": b"Np 268435456\n.",
    "a place in the memo, after padding": b"\x80\x02" + b"N0" * 4000 + in_memo(2**28),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_few_bytes_cannot_ask_for_gigabytes(tmp_path, what, monkeypatch):
    monkeypatch.setattr(
        "waferlab.data.lswmd_pickle._ListedUnpickler", lambda *_, **__: pytest.fail("was about to be unpickled")
    )
    path = write(tmp_path, HUGE[what])
    with pytest.raises(ValueError, match=r"not a complete pickle: .*(are announced|are said to lie before it)"):
        read_lswmd(path)


def with_argument(opcode: pickletools.OpcodeInfo) -> bytes:
    """The opcode with an argument as long as the format says, full of bytes that are opcodes themselves."""
    match opcode.arg and opcode.arg.n:
        case None:
            argument = b""
        case pickletools.UP_TO_NEWLINE:
            argument = b"1\nr\n" if opcode.name in ("GLOBAL", "INST") else b"1\n"
        case pickletools.TAKEN_FROM_ARGUMENT1:
            argument = b"\x03rrr"
        case pickletools.TAKEN_FROM_ARGUMENT4 | pickletools.TAKEN_FROM_ARGUMENT4U:
            argument = b"\x03\0\0\0rrr"
        case pickletools.TAKEN_FROM_ARGUMENT8U:
            argument = b"\x03\0\0\0\0\0\0\0rrr"
        case length:
            argument = (b"\0" if opcode.name in ("LONG_BINPUT", "FRAME") else b"r") * length
    return opcode.code.encode("latin1") + argument


@pytest.mark.parametrize("opcode", [o for o in pickletools.opcodes if o.name != "STOP"], ids=lambda o: o.name)
def test_every_opcode_is_passed_over_in_its_whole_length(tmp_path, opcode, monkeypatch):
    monkeypatch.setattr(
        "waferlab.data.lswmd_pickle._ListedUnpickler", lambda *_, **__: pytest.fail("was about to be unpickled")
    )
    path = write(tmp_path, with_argument(opcode) + in_memo(2**28))
    with pytest.raises(ValueError, match="268,435,456 objects are said to lie before it"):
        read_lswmd(path)


def old_memo(numbers_from: int) -> bytes:
    """What Python 2 wrote: places in the memo in digits or four bytes, counted from 0, or from 1 by its cPickle."""
    puts = b"".join(b"]p%d\n0" % (numbers_from + i) for i in range(300))
    return b"\x80\x02" + puts + b"".join(b"]r%s0" % struct.pack("<I", numbers_from + 300 + i) for i in range(300))


@pytest.mark.parametrize("numbers_from", [0, 1])
def test_an_honest_memo_is_not_refused(tmp_path, numbers_from):
    assert_is_the_frame(read_lswmd(write(tmp_path, old_memo(numbers_from) + old_pickle())))
    first = b"(lp%d\n0" % numbers_from
    assert_is_the_frame(read_lswmd(write(tmp_path, first + old_pickle())))


def test_a_large_file_is_passed_over_with_its_memo_numbers(tmp_path, monkeypatch):
    """From 50 MB on, numbers of three bytes are not looked at one by one; a fourth byte still is."""
    path = write(tmp_path, b"\x80\x02" + b"\x8e" + struct.pack("<Q", 2**26) + bytes(2**26) + b"0")
    content = path.read_bytes()
    assert_is_the_frame(read_lswmd(write(tmp_path, content + old_memo(0) + old_pickle())))
    for number, refused in ((2**24 - 1, False), (2**26, True)):
        path = write(tmp_path, content + in_memo(number))
        with pytest.raises(ValueError, match="said to lie before it" if refused else "NoneType instead of"):
            read_lswmd(path)


def test_one_map_in_a_million_rows_is_refused_before_it_is_copied(tmp_path, monkeypatch):
    wide = np.ones((2000, 2000), np.uint8)
    frame = make_frame(maps=[wide] * 40, labels=nested(["none"] * 40), lots=["lot1"] * 40)
    path = write(tmp_path, frame)
    assert path.stat().st_size < 2**23
    with pytest.raises(ValueError, match=r"more than 67,108,864 dies.* in 17 maps"):
        read_lswmd(path)


def test_texts_of_pyarrow_that_overlap_are_refused(tmp_path):
    content = pickle.dumps(make_frame(text_dtype="string[pyarrow]"))
    edges = np.array([0, 4, 8, 12, 16])
    found = [k for k in ("<i8", "<i4") if edges.astype(k).tobytes() in content]
    stream = content.replace(edges.astype(found[0]).tobytes(), np.array([0, 16, 0, 16, 16]).astype(found[0]).tobytes())
    with pytest.raises(ValueError, match="texts overlap"):
        read_lswmd(write(tmp_path, stream))


def test_bytes_are_not_read_as_pointers_to_objects(tmp_path):
    stream = old_pickle().replace(b"U\x02u1", b"U\x02O8")
    with pytest.raises(ValueError, match="waferMap has dtype object"):
        read_lswmd(write(tmp_path, stream))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    content = pickle.dumps(make_frame())
    with pytest.raises(ValueError, match=r"not a complete pickle.*download it again"):
        read_lswmd(write(tmp_path, content[: int(share * len(content))]))


def test_a_file_that_is_no_pickle_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a complete pickle"):
        read_lswmd(write(tmp_path, b"waferMap,lotName\n1,2\n"))


def test_a_pickle_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="list instead of a pandas DataFrame"):
        read_lswmd(write(tmp_path, [1, 2]))


def test_an_unknown_label_is_refused_with_its_row(tmp_path):
    with pytest.raises(ValueError, match=r"Row 2: failureType is 'Edge-Lok'.*Edge-Loc"):
        read_lswmd(write(tmp_path, make_frame(labels=nested(["none", "", "Edge-Lok", "none"]))))


def test_a_frame_without_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="None of the 4 rows"):
        read_lswmd(write(tmp_path, make_frame(labels=nested([""] * 4))))


@pytest.mark.parametrize("column", ["waferMap", "lotName", "failureType"])
def test_a_missing_column_is_named(tmp_path, column):
    with pytest.raises(ValueError, match=f"no column {column}; its columns are"):
        read_lswmd(write(tmp_path, make_frame().drop(columns=column)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.array([[0, 3]], np.uint8), "Row 2: waferMap has the value 3"),
        (np.array([[0, 257]], np.int16), "Row 2: waferMap has the value 257"),
        (np.array([[0, -1]], np.int8), "Row 2: waferMap has the value -1"),
        (np.array([[0.0, 1.0]]), "Row 2: waferMap has dtype float64.*astype"),
        (np.array([0, 1], np.uint8), r"Row 2: waferMap has shape \(2,\)"),
        (np.zeros((0, 3), np.uint8), r"Row 2: waferMap has shape \(0, 3\)"),
        (None, "Row 2: waferMap is None"),
    ],
)
def test_a_wrong_map_is_refused_with_its_row(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        read_lswmd(write(tmp_path, make_frame(maps=[*MAPS[:2], wrong, MAPS[3]])))


def test_a_labelled_row_without_a_lot_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Row 3: lotName is empty"):
        read_lswmd(write(tmp_path, make_frame(lots=["lot1", "lot1", "lot2", None])))


# --- The converted copy ---


def test_the_copy_holds_the_same_arrays_and_needs_no_pickle(tmp_path):
    cache = convert_lswmd(write(tmp_path, make_frame()))
    assert cache == tmp_path / "LSWMD.npz"
    with np.load(cache, allow_pickle=False) as arrays:
        assert_is_the_frame(dict(arrays))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LSWMD.npz", "LSWMD.pkl"]


def test_the_copy_is_made_once(tmp_path, monkeypatch):
    path = write(tmp_path, make_frame())
    cache = convert_lswmd(path)
    monkeypatch.setattr("waferlab.data.lswmd.read_lswmd", lambda path: pytest.fail("read again"))
    assert convert_lswmd(path) == cache


@pytest.mark.parametrize("seconds", [-1000, 1000])
def test_the_copy_of_an_earlier_pickle_is_made_again(tmp_path, seconds):
    path = write(tmp_path, make_frame())
    modified = convert_lswmd(path).stat().st_mtime + seconds
    write(tmp_path, make_frame(labels=nested(["Donut", "Donut", "", ""])))
    os.utime(path, (modified, modified))
    with np.load(convert_lswmd(path), allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == ["Donut", "Donut"]


def test_a_file_that_is_not_a_copy_is_not_overwritten(tmp_path):
    path = write(tmp_path, make_frame())
    np.savez(tmp_path / "LSWMD.npz", mine=np.arange(3))
    with pytest.raises(ValueError, match=r"LSWMD\.npz is in the way.*Move it"):
        convert_lswmd(path)
    assert list(np.load(tmp_path / "LSWMD.npz")) == ["mine"]


def test_a_refused_pickle_leaves_no_copy_behind(tmp_path):
    with pytest.raises(UnsafePickleError):
        convert_lswmd(write(tmp_path, Call(os.system, "true")))
    assert [path.name for path in tmp_path.iterdir()] == ["LSWMD.pkl"]


def test_a_folder_that_cannot_be_written_to_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    def refuse(path, mode="r", *_, **__):
        if mode == "xb":
            raise PermissionError(13, "Permission denied")
        return open(path, mode)

    monkeypatch.setattr(Path, "open", refuse)  # rather than chmod, which does not stop an administrator
    with pytest.raises(PermissionError, match=r"Cannot write .*LSWMD\.npz: Permission denied\. Copy LSWMD\.pkl into"):
        convert_lswmd(write(tmp_path, make_frame()))


def test_the_copy_can_be_read_by_whoever_can_read_what_this_user_writes(tmp_path):
    path = write(tmp_path, make_frame())
    (tmp_path / "plain").touch()
    copy = convert_lswmd(path)
    assert copy.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(one.suffix for one in tmp_path.iterdir()) == ["", ".npz", ".pkl"]

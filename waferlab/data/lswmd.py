"""Reads WM-811K's `LSWMD.pkl` without running anything that is in it.

A pickle is a program: it names functions, and unpickling calls them. `LSWMD.pkl` is downloaded from mirrors, so this
reader does not trust it. Two rules keep it harmless:

1. Only the exact (module, name) pairs in `ALLOWED_GLOBALS` may be named. Anything else stops the reading at that
   point, before it is imported or called.
2. What may be named is never the real thing. Each pair stands for a small class below that writes down its arguments
   and does nothing else. No pandas, numpy or pyarrow object is built from the file: numpy's own `dtype.__setstate__`,
   for one, can be talked into reading pointers out of the file. The arrays are made afterwards, from checked records.

Rule 2 has a second benefit: the file was written by a pandas of 2015 whose modules have moved since, and the reader
works whatever pandas is installed, or none.
"""

from __future__ import annotations

import gc
import math
import mmap
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from waferlab.data.maps import CLASS_NAMES
from waferlab.data.npz import read_npz

COLUMNS = ("waferMap", "lotName", "failureType")
LARGEST_DIE_VALUE = 2  # 0 no die, 1 pass, 2 fail
LONGEST_SIDE = np.iinfo(np.int16).max
CACHE_LAYOUT = 1  # raise it when the arrays of the cache change, so that old caches are made again
REWRITE = "Get the original LSWMD.pkl, or write the frame again with plain object columns (frame.to_pickle)."


class UnsafePickleError(ValueError):
    """The pickle asks for something that is not on the list of what LSWMD.pkl needs. Nothing of it was run."""


class _Record:
    """Stands for a class or function that the pickle names; keeps what it is called with and does nothing else.

    Every stand-in defines `__setstate__`, on purpose: without it, the BUILD opcode would set attributes of the file's
    choice, and could do so on the class itself. With it, BUILD on the class is a call with too few arguments.
    """

    __slots__ = ("arguments", "state")

    def __new__(cls, *arguments: Any) -> _Record:
        record = object.__new__(cls)
        record.arguments = arguments
        record.state = None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name(_Record):
    """A class that is only passed on as an argument: `numpy.ndarray`, `pandas.Index`, `pandas.StringDtype`..."""

    __slots__ = ()


class _Missing(_Record):
    """`pandas.NA`: a value rather than a class, so the name itself is what stands in a cell."""

    __slots__ = ()


class _DataFrame(_Record):
    """`pandas.DataFrame`: its state is a dictionary with the block manager in it."""

    __slots__ = ()


class _BlockManager(_Record):
    """pandas' `BlockManager`: called with (blocks, axes), or, in older files, given a tuple as its state."""

    __slots__ = ()


class _Block(_Record):
    """A block of columns of one dtype: called with (values, positions of its columns, ...)."""

    __slots__ = ()


class _BlockMaker(_Record):
    """`functools.partial(new_block, ndim=2)`, as pandas 1.3 wrote it. Makes a `_Block`, whatever it is told."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> _Block:
        return _Block(*arguments)


class _Slice(_Record):
    """`slice`."""

    __slots__ = ()


class _Index(_Record):
    """A pandas index, made by `_new_Index(class, {"data": ...})`."""

    __slots__ = ()

    def cells(self) -> list[Any]:
        fields = self.arguments[1] if len(self.arguments) == 2 else None
        return _cells(fields.get("data") if isinstance(fields, dict) else None)


class _Bytes(_Record):
    """`bytes` or `bytearray`, which protocol 2 calls with nothing or with the finished bytes."""

    __slots__ = ()

    def __new__(cls, content: bytes = b"") -> bytes:  # type: ignore[misc]
        # A number would be a length: bytes(10**12).
        return content if isinstance(content, bytes) else _malformed("bytes made from something else")


class _Encode(_Record):
    """`_codecs.encode(text, "latin1")`: how protocol 2 writes bytes. Other codecs would import modules by name."""

    __slots__ = ()

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        return text.encode("latin1") if encoding == "latin1" else _malformed(f"bytes in the encoding {encoding!r}")


class _Dtype(_Record):
    """`numpy.dtype`: called with a code such as "u1", its state has the byte order and, if structured, the fields."""

    __slots__ = ()
    _CODE: ClassVar[re.Pattern[str]] = re.compile(r"[biufSUO]\d{1,6}")

    def dtype(self) -> np.dtype:
        code = self.arguments[0] if self.arguments else None
        state = self.state if isinstance(self.state, tuple) and len(self.state) > 4 else (3, "|", None, None, None)
        order, structure = state[1], state[2:5]
        plain = isinstance(code, str) and self._CODE.fullmatch(code) and structure == (None, None, None)
        if not plain or order not in ("|", "<", ">", "="):
            _malformed(f"an array of dtype {code!r}")
        return np.dtype("O" if code[0] == "O" else order + code)


class _Array(_Record):
    """`numpy.ndarray`, made by `_reconstruct(...)` and filled by its state. Becomes an array only when asked.

    There are three of them in every row of the frame, hence the bare assignments.
    """

    __slots__ = ("data", "descr", "order", "shape")

    def __new__(cls, *_: Any) -> _Array:
        array = object.__new__(_Array)
        array.shape = array.descr = array.data = None
        array.order = "C"
        return array

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.descr, fortran, self.data = state
        if fortran:
            self.order = "F"

    def is_empty(self) -> bool:
        return isinstance(self.shape, tuple) and 0 in self.shape

    def dtype(self) -> np.dtype:
        return self.descr.dtype() if isinstance(self.descr, _Dtype) else _malformed("an array without a dtype")

    def size(self) -> int:
        sides = self.shape
        if not isinstance(sides, tuple) or not all(type(side) is int and side >= 0 for side in sides):
            _malformed(f"an array of shape {sides!r:.80}")
        return math.prod(sides)

    def numpy(self) -> np.ndarray:
        """The array that the record describes, a view of the file's bytes; its dtype has no objects in it.

        Raises:
            ValueError: shape, dtype and data do not fit each other. The data decide, so that no shape, however large,
                makes numpy allocate anything.
        """
        dtype = self.dtype()
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # str: written by Python 2
        fits = isinstance(data, bytes | bytearray) and dtype.kind != "O" and len(data) == self.size() * dtype.itemsize
        if not fits or self.order not in ("C", "F"):
            _malformed(f"an array of shape {self.shape!r:.80} and dtype {dtype} with data of another size or kind")
        if not data:
            return np.empty(self.shape, dtype)
        return np.frombuffer(data, dtype).reshape(self.shape, order=self.order)

    def cells(self) -> list[Any]:
        """The elements in C order. An array of objects was written as a list of them, in that order already."""
        if isinstance(self.data, list):
            if self.dtype().kind != "O" or len(self.data) != self.size():
                _malformed(f"an array of shape {self.shape!r:.80} with {len(self.data)} objects")
            return self.data
        return self.numpy().ravel().tolist()


class _ArrayFromBuffer(_Array):
    """`numpy._core.numeric._frombuffer(data, dtype, shape, order)`, which protocol 5 uses."""

    __slots__ = ()

    def __new__(cls, data: Any, descr: Any, shape: Any, order: Any, *_: Any) -> _Array:
        array = _Array.__new__(_Array)
        array.data, array.descr, array.shape, array.order = data, descr, shape, order
        return array


class _Scalar(_Array):
    """`numpy._core.multiarray.scalar(dtype, data)`: one number or text, kept as an array of one element."""

    __slots__ = ()

    def __new__(cls, descr: Any, data: Any) -> _Array:
        return _ArrayFromBuffer(data, descr, (1,), "C")


class _Buffer(_Record):
    """`pyarrow.py_buffer(data)`."""

    __slots__ = ()


class _ArrowArray(_Record):
    """A pyarrow array of strings, called with ((type, length, nulls, offset, buffers, children, dictionary),)."""

    __slots__ = ()
    _OFFSETS: ClassVar[dict[str, str]] = {"string": "<i4", "large_string": "<i8"}

    def cells(self) -> list[str | None]:
        """The texts, None where there is none.

        Layout: https://arrow.apache.org/docs/format/Columnar.html
        """
        match self.arguments:
            case ((_Name(arguments=(str(kind),)), int(length), _, int(first), [valid, _Buffer() as ends, text], *_),):
                pass
            case _:
                _malformed("a pyarrow array that is not one of strings")
        if kind not in self._OFFSETS or min(length, first) < 0:
            _malformed(f"a pyarrow array of type {kind!r}, length {length}, offset {first}")
        edges = np.frombuffer(ends.arguments[0], self._OFFSETS[kind])[first : first + length + 1].tolist()
        if len(edges) != length + 1:
            _malformed(f"a pyarrow array of {length} texts with offsets for {len(edges) - 1}")
        data = bytes(text.arguments[0]) if isinstance(text, _Buffer) else b""
        if any(a > b for a, b in pairwise([0, *edges, len(data)])):  # each text would be a copy of all others
            _malformed("a pyarrow array whose texts overlap")
        cells: list[str | None] = [data[a:b].decode() for a, b in pairwise(edges)]
        if isinstance(valid, _Buffer):
            present = np.unpackbits(np.frombuffer(valid.arguments[0], np.uint8), bitorder="little")[first:]
            cells = [cell if there else None for cell, there in zip(cells, present[:length], strict=True)]
        return cells


class _StringColumn(_Record):
    """pandas' `StringArray` (state: a tuple with an array) or `ArrowStringArray` (state: a dict with one)."""

    __slots__ = ()

    def cells(self) -> list[Any]:
        parts = self.state.values() if isinstance(self.state, dict) else self.state or ()
        arrays = [part for part in parts if isinstance(part, _Array | _ArrowArray)]
        return arrays[0].cells() if len(arrays) == 1 else _malformed("a string column without its array")


def _malformed(what: str) -> Any:
    raise ValueError(f"The file holds {what}, which is not part of LSWMD.pkl. {REWRITE}")


def _cells(values: Any) -> list[Any]:
    if not isinstance(values, _Array | _StringColumn):
        _malformed(f"{type(values).__name__.lstrip('_')} where a column should be")
    return values.cells()


def _pairs(modules: str, names: str, stand_in: type) -> dict[tuple[str, str], type]:
    return {pair: stand_in for pair in product(modules.split(), names.split())}


# The modules of one line are one module at different dates. `pandas` alone is what pandas 3 writes.
_INDEX_MODULES = "pandas.core.index pandas.indexes.base pandas.core.indexes.base"
_NUMERIC_INDEX_MODULES = "pandas.core.index pandas.indexes.numeric pandas.core.indexes.numeric"
ALLOWED_GLOBALS: dict[tuple[str, str], type] = {
    **_pairs("numpy", "ndarray", _Name),
    **_pairs("numpy", "dtype", _Dtype),
    **_pairs("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", _Array),
    **_pairs("numpy.core.multiarray numpy._core.multiarray", "scalar", _Scalar),
    **_pairs("numpy.core.numeric numpy._core.numeric", "_frombuffer", _ArrayFromBuffer),
    **_pairs("__builtin__ builtins", "slice", _Slice),
    **_pairs("__builtin__ builtins", "bytes bytearray", _Bytes),
    **_pairs("_codecs", "encode", _Encode),
    **_pairs("pandas.core.frame pandas", "DataFrame", _DataFrame),
    **_pairs("pandas.core.internals pandas.core.internals.managers", "BlockManager", _BlockManager),
    **_pairs("pandas._libs.internals", "_unpickle_block", _Block),
    **_pairs("pandas.core.internals.blocks", "new_block", _Block),
    **_pairs("functools", "partial", _BlockMaker),
    **_pairs(_INDEX_MODULES, "_new_Index", _Index),
    **_pairs(f"{_INDEX_MODULES} pandas", "Index", _Name),
    **_pairs(_NUMERIC_INDEX_MODULES, "Int64Index", _Name),
    **_pairs("pandas.indexes.range pandas.core.indexes.range pandas", "RangeIndex", _Name),
    **_pairs("pandas.core.arrays.string_ pandas", "StringDtype", _Name),
    **_pairs("pandas.core.arrays.string_ pandas.arrays", "StringArray", _StringColumn),
    **_pairs("pandas.core.arrays.string_arrow pandas.arrays", "ArrowStringArray", _StringColumn),
    # Called with (class, checksum, None), and then given the state of a StringArray.
    **_pairs("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked", _StringColumn),
    **_pairs("pandas pandas._libs.missing", "NA", _Missing),
    **_pairs("pyarrow.lib", "_restore_array", _ArrowArray),
    **_pairs("pyarrow.lib", "py_buffer", _Buffer),
    **_pairs("pyarrow.lib", "type_for_alias", _Name),
}


class _ListedUnpickler(pickle.Unpickler):
    """An unpickler that hands out the stand-ins of `ALLOWED_GLOBALS` and imports nothing."""

    def find_class(self, module: str, name: str) -> type:
        try:
            return ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"The pickle asks for {module}.{name}, which LSWMD.pkl has no use for. A pickle can run any code "
                "through such a name, so reading stopped before anything was run. Do not open this file with pandas "
                f"or pickle. {REWRITE}"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(
            f"The pickle asks for the outside object {pid!r:.80}, which LSWMD.pkl has no use for. {REWRITE}"
        )


# Opcodes without content, or with so little that it cannot hurt, as the pickle format defines them (`pickletools`).
_HARMLESS = rb"[()012NRbd}aes\]ltuoQ\x81\x85-\x89\x8f-\x94\x97\x98]|[Khq\x80\x82].|[M\x83]..|[Jj\x84].{4}|G.{8}"
# How many bytes say how long the content of the others is, and which end their content with as many line breaks.
_COUNTED = dict.fromkeys(b"U\x8cC\x8a", 1) | dict.fromkeys(b"TXB\x8b", 4) | dict.fromkeys(b"\x8d\x8e\x96\x95", 8)
_LINES = dict.fromkeys(b"FILSVPpg", 1) | dict.fromkeys(b"ci", 2)
_FRAME, _LONG_BINPUT, _PUT = b"\x95rp"


def _check_sizes(path: Path) -> None:
    """Refuses a pickle that would make the unpickler ask for far more memory than the file is large.

    Two things let a few bytes ask for gigabytes: content that is said to be longer than the file, and numbers in the
    memo, which the unpickler keeps as one long array. An honest pickle counts its memo up from 0 or 1, and each entry
    takes three bytes at the least, so that a number is hardly above a third of its place in the file.

    Raises:
        pickle.UnpicklingError: the file says that it holds more than it can.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if size == 0:  # cannot be mapped; the unpickler says the rest
        return
    # The memo numbers that fit three bytes are bounded well enough in a file of 50 MB: passed over at full speed.
    harmless = _HARMLESS + (rb"|r...\x00" if size > 3 * 2**24 else b"")
    pass_over = re.compile(rb"(?:" + harmless + rb")*+", re.DOTALL).match
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        at = 0
        while (at := pass_over(stream, at).end()) < size:
            opcode = stream[at]
            if width := _COUNTED.get(opcode):
                start = at + 1 + width
                length = int.from_bytes(stream[at + 1 : start], "little")
                if start + length > size:
                    raise pickle.UnpicklingError(f"at byte {at:,}, {length:,} bytes are announced")
                at = start if opcode == _FRAME else start + length  # what is in a frame are opcodes again
            elif opcode == _LONG_BINPUT:
                _check_memo(int.from_bytes(stream[at + 1 : at + 5], "little"), at=at)
                at += 5
            elif lines := _LINES.get(opcode):
                end = at
                for _ in range(lines):
                    end = stream.find(b"\n", end + 1)
                    if end < 0:
                        return
                if opcode == _PUT:
                    number = stream[at + 1 : end]
                    _check_memo(int(number) if number.isdigit() and len(number) < 20 else 2**64, at=at)
                at = end + 1
            else:  # the end, or no opcode at all: the unpickler stops here, too
                return


def _check_memo(number: int, *, at: int) -> None:
    if number > at // 3 + 1:
        raise pickle.UnpicklingError(f"at byte {at:,}, {number:,} objects are said to lie before it")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of records are made and none is garbage; the collector would walk over all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load_records(path: Path) -> _DataFrame:
    """Unpickles `path` into records.

    Raises:
        UnsafePickleError: the file names something outside `ALLOWED_GLOBALS`.
        ValueError: the file is cut short, is not a pickle, or is not a pickle of a frame.
        OSError: the file cannot be read.
    """
    try:
        _check_sizes(path)
        with path.open("rb", buffering=1 << 20) as file:
            root = _ListedUnpickler(file, encoding="latin1").load()  # latin1: how Python 2 wrote bytes, one to one
    except (ValueError, OSError):
        raise
    except Exception as error:
        # The stream decides which exception a damaged or hostile pickle ends in, so any of them means just that.
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(
            f"{path} ({size}) is not a complete pickle: {type(error).__name__}: {error}. The original LSWMD.pkl has "
            "2,095,505,977 bytes; download it again, and check that the archive it came in was unpacked in full."
        ) from error
    if not isinstance(root, _DataFrame):
        _malformed(f"{type(root).__name__.lstrip('_')} instead of a pandas DataFrame")
    return root


def _blocks(frame: _DataFrame) -> tuple[_Index, list[tuple[Any, Any]]]:
    """The frame's column index, and its blocks as (values, positions), from any of the layouts pandas has used."""
    fields = frame.state if isinstance(frame.state, dict) else {}
    manager = fields.get("_mgr", fields.get("_data"))  # `_data` until pandas 1.0
    match manager:
        case _BlockManager(state=(_, _, _, {"0.14.1": {"axes": [_Index() as names, _], "blocks": [*blocks]}}, *_)):
            pairs = [(block.get("values"), block.get("mgr_locs")) for block in blocks if isinstance(block, dict)]
        case _BlockManager(arguments=((*blocks,), [_Index() as names, _])):
            pairs = [block.arguments[:2] for block in blocks if isinstance(block, _Block) and len(block.arguments) > 1]
        case _:
            _malformed("a frame in a layout other than those of pandas 0.14 to 3")
    return names, pairs


def _positions(positions: Any, columns: int) -> list[int]:
    """Which of the frame's columns a block has: a slice, or an array of integers."""
    if isinstance(positions, _Slice):
        return list(range(columns))[slice(*positions.arguments)]
    return [position for position in _cells(positions) if isinstance(position, int) and 0 <= position < columns]


def _columns(frame: _DataFrame) -> dict[str, list[Any]]:
    """The cells of the columns in `COLUMNS`, top to bottom. Cells are Python values or records."""
    index, blocks = _blocks(frame)
    names = index.cells()
    columns: dict[str, list[Any]] = {}
    for values, places in blocks:
        held = [names[position] for position in _positions(places, len(names))]
        if not set(held).intersection(COLUMNS):
            continue
        cells = _cells(values)  # a block is a row-major table with a row for each of its columns
        rows = len(cells) // len(held)
        columns |= {name: cells[i * rows : (i + 1) * rows] for i, name in enumerate(held) if name in COLUMNS}
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(f"The frame has no column {', '.join(missing)}; its columns are {names}. {REWRITE}")
    if len({len(cells) for cells in columns.values()}) != 1:
        _malformed(f"columns of different lengths, {[len(cells) for cells in columns.values()]}")
    return columns


def _text(cell: Any, *, column: str, row: int) -> str | None:
    """The text in a cell, however deep it is nested (`array([['none']])`), or None for an empty one."""
    content = cell
    for _ in range(4):  # a limit, because a pickled list can contain itself
        if isinstance(content, _Array):
            content = content.cells()
        if not isinstance(content, list | tuple) or len(content) > 1:
            break
        content = content[0] if content else None
    if content is None or content == "" or content is _Missing or content != content:  # NaN is not itself
        return None
    if isinstance(content, bytes):
        content = content.decode("latin1")
    if not isinstance(content, str):
        raise ValueError(f"Row {row}: {column} is {content!r:.80}, not a text or an array with one text. {REWRITE}")
    return content


def _labels(cells: list[Any]) -> tuple[list[int], list[str]]:
    """The rows that have a label, and the labels.

    Raises:
        ValueError: a label is not one of `CLASS_NAMES`.
    """
    rows, labels = [], []
    for row, cell in enumerate(cells):
        if isinstance(cell, _Array) and cell.is_empty():  # four rows in five: spares them the way through _text
            continue
        label = _text(cell, column="failureType", row=row)
        if label is None:
            continue
        if label not in CLASS_NAMES:
            raise ValueError(
                f"Row {row}: failureType is {label!r}, which is not a class of WM-811K. Rename it in the file to one "
                f"of {', '.join(CLASS_NAMES)}, or empty the cell to leave the row out."
            )
        rows.append(row)
        labels.append(label)
    if not rows:
        raise ValueError(f"None of the {len(cells)} rows has a failureType, so there is no label to use. {REWRITE}")
    return rows, labels


def _lots(cells: list[Any], rows: list[int]) -> np.ndarray:
    """A number for each row's lot, counted from 0 in the order in which the lots appear: int32 [N]."""
    numbers: dict[str, int] = {}
    groups = np.empty(len(rows), np.int32)
    for i, row in enumerate(rows):
        lot = _text(cells[row], column="lotName", row=row)
        if lot is None:
            raise ValueError(
                f"Row {row}: lotName is empty, but splits keep lots together. Name the lot, or empty "
                "the row's failureType to leave it out."
            )
        groups[i] = numbers.setdefault(lot, len(numbers))
    return groups


def _wafer_map(cell: Any, *, row: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A cell of waferMap as its dies, uint8 in C order, and its shape (rows, columns)."""
    if not isinstance(cell, _Array):
        raise ValueError(f"Row {row}: waferMap is {cell!r:.80}, not an array. {REWRITE}")
    if cell.dtype().kind not in "bui":
        raise ValueError(
            f"Row {row}: waferMap has dtype {cell.dtype()}, but dies are whole numbers from 0 to {LARGEST_DIE_VALUE}. "
            "Convert it with .astype('uint8')."
        )
    dies = cell.numpy()
    if dies.ndim != 2 or not all(0 < side <= LONGEST_SIDE for side in dies.shape):
        raise ValueError(f"Row {row}: waferMap has shape {dies.shape}, but a map is a rectangle of dies. {REWRITE}")
    if dies.dtype.itemsize > 1 or dies.dtype.kind == "i":  # a cast would turn 257 and -255 into 1
        _check_values(dies, row=row)
    return dies.astype(np.uint8, copy=False).ravel(), dies.shape


def _check_values(dies: np.ndarray, *, row: int) -> None:
    wrong = dies[(dies < 0) | (dies > LARGEST_DIE_VALUE)]
    if wrong.size:
        raise ValueError(
            f"Row {row}: waferMap has the value {wrong.flat[0]}, but dies are 0 (none), 1 (pass) or 2 (fail). "
            "Correct the map, or empty the row's failureType to leave it out."
        )


def _flatten_maps(cells: list[Any], rows: list[int], *, most_dies: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The maps of `rows` one after another: dies uint8 [D], offsets int64 [N+1], shapes int16 [N,2].

    A pickle can hold a map once and name it a million times, so there is a bound on all dies together.

    Empties `cells` on its way, so that no map is kept in two forms for longer than it takes to join them.
    """
    maps, shapes, total = [], np.empty((len(rows), 2), np.int16), 0
    for i, row in enumerate(rows):
        dies, shapes[i] = _wafer_map(cells[row], row=row)
        maps.append(dies)
        cells[row] = None
        total += len(dies)
        if total > most_dies:
            _malformed(f"more than {most_dies:,} dies, far more than a file of its size can, in {i + 1:,} maps")
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(dies) for dies in maps], out=offsets[1:])
    flat = np.concatenate(maps)
    largest = flat.max()
    if largest > LARGEST_DIE_VALUE:
        i = int(np.searchsorted(offsets, flat.argmax(), side="right")) - 1
        _check_values(flat[offsets[i] : offsets[i + 1]], row=rows[i])
    return flat, offsets, shapes


def read_lswmd(path: Path) -> dict[str, np.ndarray]:
    """Reads the labelled maps out of `LSWMD.pkl`.

    Reads pickles written by pandas 0.14 to 3 under Python 2 or 3, in any pickle protocol. Needs no pandas.

    Args:
        path: the pickle of a frame with at least the columns waferMap, lotName and failureType. Labels may be nested
            in arrays (`array([['none']])`); a row whose failureType is empty is left out.

    Returns:
        For N labelled rows with D dies in all:
        `maps_flat` uint8 [D], the maps one after another, each row by row, 0 no die / 1 pass / 2 fail;
        `offsets` int64 [N+1], where each map starts and the last one ends;
        `shapes` int16 [N,2], rows and columns of each map;
        `labels` str [N], one of `CLASS_NAMES`;
        `group` int32 [N], the lot, numbered from 0 in order of appearance;
        `row` int32 [N], the row in the file, counted from 0.

    Raises:
        UnsafePickleError: the pickle names something that LSWMD.pkl has no use for; nothing was run.
        ValueError: not a complete pickle of such a frame, or a cell is wrong; the message says which.
        OSError: the file cannot be read.
    """
    with _no_garbage_collection():
        columns = _columns(_load_records(Path(path)))
        rows, labels = _labels(columns.pop("failureType"))
        group = _lots(columns.pop("lotName"), rows)
        maps = columns.pop("waferMap")
        for row in set(range(len(maps))).difference(rows):
            maps[row] = None  # most of the file is unlabelled: give that memory back before the copy is made
        most_dies = max(2**26, 2 * Path(path).stat().st_size)
        flat, offsets, shapes = _flatten_maps(maps, rows, most_dies=most_dies)
    return {
        "maps_flat": flat,
        "offsets": offsets,
        "shapes": shapes,
        "labels": np.array(labels),
        "group": group,
        "row": np.array(rows, np.int32),
    }


def _fingerprint(path: Path) -> str:
    """Size and date of the pickle: enough to notice another file, without reading two gigabytes for a checksum."""
    status = path.stat()
    return f"layout {CACHE_LAYOUT}, {path.name}, {status.st_size} bytes, modified {status.st_mtime_ns}"


def _is_current(cache: Path, pickle_path: Path) -> bool:
    """Whether `cache` holds the arrays of `pickle_path` as it is now.

    Raises:
        ValueError: `cache` is not one that this module wrote, so it is not overwritten.
    """
    if not cache.exists():
        return False
    try:
        source = str(read_npz(cache, ["source"])["source"])
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{cache} is in the way: the converted copy of {pickle_path.name} belongs there, but this file has no "
            "`source` entry, so it was not made from it. Move it away, or delete it."
        ) from error
    return source == _fingerprint(pickle_path) and cache.stat().st_mtime_ns >= pickle_path.stat().st_mtime_ns


def convert_lswmd(path: Path) -> Path:
    """Converts `LSWMD.pkl` into `LSWMD.npz` beside it, once; later calls find the copy and only check its date.

    The copy holds the arrays of `read_lswmd` and `source`, a text that identifies the pickle it was made from. It is
    written under another name and then moved into place, so that it is either complete or absent.

    Args:
        path: the pickle.

    Returns:
        The path of the copy, to be opened with `numpy.load(path, allow_pickle=False)`.

    Raises:
        UnsafePickleError, ValueError, OSError: as `read_lswmd`.
        ValueError: another file has the copy's name.
        PermissionError: the folder cannot be written to.
    """
    path = Path(path)
    cache = path.with_suffix(".npz")
    if _is_current(cache, path):
        return cache
    try:
        # Before the reading, so that a folder that cannot be written to shows at once.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".npz")
    except OSError as error:
        raise PermissionError(
            f"Cannot write the converted copy {cache}: {error.strerror}. Copy {path.name} into a folder that you can "
            "write to, or use read_lswmd, which writes nothing."
        ) from error
    temporary = Path(name)
    try:
        source = _fingerprint(path)  # taken first: a pickle that changes while it is read is then read again
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **read_lswmd(path), source=np.array(source))
        os.replace(temporary, cache)
    finally:
        temporary.unlink(missing_ok=True)
    return cache

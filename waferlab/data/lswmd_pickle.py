"""The stand-ins that `LSWMD.pkl` is unpickled into: nothing that it names is ever imported, called or built.

A pickle is a program: it names functions, and unpickling calls them. `LSWMD.pkl` is downloaded from mirrors, so it is
not trusted. Two rules keep it harmless:

1. Only the exact (module, name) pairs in `ALLOWED_GLOBALS` may be named. Anything else stops the reading at that
   point, before it is imported or called.
2. What may be named is never the real thing. Each pair stands for a small class below that writes down its arguments
   and does nothing else. No pandas, numpy or pyarrow object is built from the file: numpy's own `dtype.__setstate__`,
   for one, can be talked into reading pointers out of the file. The arrays are made afterwards, from checked records.

Rule 2 has a second benefit: the file was written by a pandas of 2015 whose modules have moved since, and the reader
works whatever pandas is installed, or none.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
import reprlib
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

COLUMNS = ("waferMap", "lotName", "failureType")
REWRITE = "Get the original LSWMD.pkl, or write the frame again with plain object columns (frame.to_pickle)."


def short(value: Any) -> str:
    """As `repr`, of a line at most: a list of lists of lists may stand for more than any memory holds."""
    shortened = reprlib.Repr()
    shortened.maxlevel, shortened.maxstring, shortened.maxother = 2, 60, 60
    return f"{shortened.repr(value):.80}"


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


class Missing(_Record):
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
        return content if isinstance(content, bytes) else malformed("bytes made from something else")


class _Encode(_Record):
    """`_codecs.encode(text, "latin1")`: how protocol 2 writes bytes. Other codecs would import modules by name."""

    __slots__ = ()

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        return text.encode("latin1") if encoding == "latin1" else malformed(f"bytes in the encoding {short(encoding)}")


class _Dtype(_Record):
    """`numpy.dtype`: called with a code such as "u1", its state has the byte order and, if structured, the fields."""

    __slots__ = ()
    _CODE: ClassVar[re.Pattern[str]] = re.compile(r"[iu][1248]|f[248]|b1|[SUO]\d{1,6}")

    def dtype(self) -> np.dtype:
        code = self.arguments[0] if self.arguments else None
        state = self.state if isinstance(self.state, tuple) and len(self.state) > 4 else (3, "|", None, None, None)
        order, structure = state[1], state[2:5]
        plain = isinstance(code, str) and self._CODE.fullmatch(code) and structure == (None, None, None)
        if not plain or order not in ("|", "<", ">", "="):
            malformed(f"an array of dtype {short(code)}")
        return np.dtype("O" if code[0] == "O" else order + code)


class Array(_Record):
    """`numpy.ndarray`, made by `_reconstruct(...)` and filled by its state. Becomes an array only when asked.

    There are three of them in every row of the frame, hence the bare assignments.
    """

    __slots__ = ("data", "descr", "order", "shape")

    def __new__(cls, *_: Any) -> Array:
        """An array without content; its state, which comes next, brings that."""
        array = object.__new__(Array)
        array.shape = array.descr = array.data = None
        array.order = "C"
        return array

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.descr, fortran, self.data = state
        if fortran:
            self.order = "F"

    def is_empty(self) -> bool:
        """Whether a side of its shape is 0."""
        return isinstance(self.shape, tuple) and 0 in self.shape

    def dtype(self) -> np.dtype:
        """Its dtype, one of plain numbers, texts or objects."""
        return self.descr.dtype() if isinstance(self.descr, _Dtype) else malformed("an array without a dtype")

    def size(self) -> int:
        """How many elements its shape says that it has."""
        sides = self.shape
        if not isinstance(sides, tuple) or not all(type(side) is int and side >= 0 for side in sides):
            malformed(f"an array of shape {short(sides)}")
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
            malformed(f"an array of shape {short(self.shape)} and dtype {dtype} with data of another size or kind")
        if not data:
            return np.empty(self.shape, dtype)
        return np.frombuffer(data, dtype).reshape(self.shape, order=self.order)

    def cells(self) -> list[Any]:
        """The elements in C order. An array of objects was written as a list of them, in that order already."""
        if isinstance(self.data, list):
            if self.dtype().kind != "O" or len(self.data) != self.size():
                malformed(f"an array of shape {short(self.shape)} with {len(self.data)} objects")
            return self.data
        return self.numpy().ravel().tolist()


class _ArrayFromBuffer(Array):
    """`numpy._core.numeric._frombuffer(data, dtype, shape, order)`, which protocol 5 uses."""

    __slots__ = ()

    def __new__(cls, data: Any, descr: Any, shape: Any, order: Any, *_: Any) -> Array:
        array = Array.__new__(Array)
        array.data, array.descr, array.shape, array.order = data, descr, shape, order
        return array


class _Scalar(Array):
    """`numpy._core.multiarray.scalar(dtype, data)`: one number or text, kept as an array of one element."""

    __slots__ = ()

    def __new__(cls, descr: Any, data: Any) -> Array:
        return _ArrayFromBuffer(data, descr, (1,), "C")


class _Buffer(_Record):
    """`pyarrow.py_buffer(data)`."""

    __slots__ = ()

    def content(self) -> bytes | bytearray:
        """Its bytes; a number would be a length, as `bytes(10**12)` has it."""
        match self.arguments:
            case (bytes(content) | bytearray(content),):
                return content
            case _:
                malformed("a pyarrow buffer that is not one of bytes")


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
                malformed("a pyarrow array that is not one of strings")
        if kind not in self._OFFSETS or min(length, first) < 0:
            malformed(f"a pyarrow array of type {short(kind)}, length {short(length)}, offset {short(first)}")
        edges = np.frombuffer(ends.content(), self._OFFSETS[kind])[first : first + length + 1].tolist()
        if len(edges) != length + 1:
            malformed(f"a pyarrow array of {length} texts with offsets for {len(edges) - 1}")
        data = text.content() if isinstance(text, _Buffer) else b""
        if any(a > b for a, b in pairwise([0, *edges, len(data)])):  # each text would be a copy of all others
            malformed("a pyarrow array whose texts overlap")
        cells: list[str | None] = [data[a:b].decode() for a, b in pairwise(edges)]
        if isinstance(valid, _Buffer):
            present = np.unpackbits(np.frombuffer(valid.content(), np.uint8), bitorder="little")[first:]
            cells = [cell if there else None for cell, there in zip(cells, present[:length], strict=True)]
        return cells


class _StringColumn(_Record):
    """pandas' `StringArray` (state: a tuple with an array) or `ArrowStringArray` (state: a dict with one)."""

    __slots__ = ()

    def cells(self) -> list[Any]:
        parts = self.state.values() if isinstance(self.state, dict) else self.state or ()
        arrays = [part for part in parts if isinstance(part, Array | _ArrowArray)]
        return arrays[0].cells() if len(arrays) == 1 else malformed("a string column without its array")


def malformed(what: str) -> Any:
    """Raises the ValueError that says what does not belong into LSWMD.pkl; used where an expression stands."""
    raise ValueError(f"The file holds {what}, which is not part of LSWMD.pkl. {REWRITE}")


def _cells(values: Any) -> list[Any]:
    if not isinstance(values, Array | _StringColumn):
        malformed(f"{type(values).__name__.lstrip('_')} where a column should be")
    return values.cells()


def _pairs(modules: str, names: str, stand_in: type) -> dict[tuple[str, str], type]:
    return {pair: stand_in for pair in product(modules.split(), names.split())}


# The modules of one line are one module at different dates. `pandas` alone is what pandas 3 writes.
_INDEX_MODULES = "pandas.core.index pandas.indexes.base pandas.core.indexes.base"
_NUMERIC_INDEX_MODULES = "pandas.core.index pandas.indexes.numeric pandas.core.indexes.numeric"
ALLOWED_GLOBALS: dict[tuple[str, str], type] = {
    **_pairs("numpy", "ndarray", _Name),
    **_pairs("numpy", "dtype", _Dtype),
    **_pairs("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", Array),
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
    **_pairs("pandas pandas._libs.missing", "NA", Missing),
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
            f"The pickle asks for the outside object {short(pid)}, which LSWMD.pkl has no use for. {REWRITE}"
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


def _load_records(path: Path) -> _DataFrame:
    """Unpickles `path` into records; raises as `load_columns`."""
    try:
        _check_sizes(path)
        with path.open("rb", buffering=1 << 20) as file:
            root = _ListedUnpickler(file, encoding="latin1").load()  # latin1: how Python 2 wrote bytes, one to one
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        # The stream decides which exception a damaged or hostile pickle ends in, so any of them means just that.
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(
            f"{path} ({size}) is not a complete pickle: {type(error).__name__}: {error}. The original LSWMD.pkl has "
            "2,095,505,977 bytes; download it again, and check that the archive it came in was unpacked in full."
        ) from error
    if not isinstance(root, _DataFrame):
        malformed(f"{type(root).__name__.lstrip('_')} instead of a pandas DataFrame")
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
            malformed("a frame in a layout other than those of pandas 0.14 to 3")
    return names, pairs


def _positions(positions: Any, columns: int) -> list[int]:
    """Which of the frame's columns a block has: a slice, or an array of integers."""
    if isinstance(positions, _Slice):
        if len(positions.arguments) != 3 or not all(isinstance(edge, int | None) for edge in positions.arguments):
            malformed("a slice of something else than whole numbers")
        return list(range(columns))[slice(*positions.arguments)]
    return [position for position in _cells(positions) if isinstance(position, int) and 0 <= position < columns]


def _columns(frame: _DataFrame) -> dict[str, list[Any]]:
    """The cells of the columns in `COLUMNS`."""
    index, blocks = _blocks(frame)
    names = index.cells()
    if not all(isinstance(name, str | int) for name in names):
        malformed("columns whose names are neither texts nor numbers")
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
        raise ValueError(f"The frame has no column {', '.join(missing)}; its columns are {short(names)}. {REWRITE}")
    if len({len(cells) for cells in columns.values()}) != 1:
        malformed(f"columns of different lengths, {[len(cells) for cells in columns.values()]}")
    return columns


def load_columns(path: Path) -> dict[str, list[Any]]:
    """The cells of the columns in `COLUMNS`, top to bottom: numbers, texts, lists of them, `Array` or `Missing`.

    Raises:
        UnsafePickleError: the file names something outside `ALLOWED_GLOBALS`; nothing was run.
        ValueError: the file is cut short, is not a pickle, or is not one of a frame with these columns.
        OSError: the file cannot be read.
    """
    return _columns(_load_records(path))

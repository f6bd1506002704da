"""What strangers' bytes reach: a function for each reader, which raises whatever no user should ever see.

A reader may take its input or refuse it with the error that it promises. `fuzz.py` throws millions of inputs at them;
inputs that once went wrong lie in `tests/corpus/`, and a test throws those again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

SENTENCE = 1000  # characters: more than any error needs
ARRAYS = ("maps_flat", "offsets", "shapes", "labels", "group", "maps", "arr_0", "arr_1", "other")
DTYPES = ("|u1", "<i8", "<i2", "<u8", "<f8", "<f4", "|b1", "<U9", "|S9", "|O", "<c16", "<M8[s]", ">i4", "|V3")
_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
SCRATCH = Path(_folder.name)


@contextlib.contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Lets errors pass that the reader promises, if a person can read them."""
    try:
        yield
    except kinds as error:
        assert 0 < len(str(error)) <= SENTENCE, f"an error of {len(str(error))} characters"


def options(data: bytes) -> None:
    """OPTION=VALUE: the first byte chooses the option, the rest is what stands behind the equals sign."""
    import integrated_pipeline  # noqa: F401  which registers the models
    from waferlab.config import ExperimentConfig, parse_options
    from waferlab.errors import ConfigError

    names = option_names()
    name = names[data[0] % len(names)] if data else "seed"
    with refusals(ConfigError):
        ExperimentConfig(**parse_options([f"{name}={data[1:].decode('utf-8', 'replace')}"])).as_plain()


def option_names() -> list[str]:
    """Of all options, in the order of the alphabet."""
    from dataclasses import fields

    from waferlab.config import ExperimentConfig

    return sorted(option.name for option in fields(ExperimentConfig))


def yaml(data: bytes) -> None:
    """A file of options."""
    import integrated_pipeline  # noqa: F401  which registers the models
    from waferlab.config import ExperimentConfig, read_options
    from waferlab.errors import ConfigError

    file = SCRATCH / "options.yaml"
    file.write_bytes(data)
    with refusals(ConfigError):
        ExperimentConfig(**read_options(file)).as_plain()


def npz(data: bytes) -> None:
    """An .npz for a training, and the same for answers; the bytes choose arrays, or are the file."""
    from waferlab.data.reading import load_wafer_maps
    from waferlab.data.streaming import stream_wafer_maps
    from waferlab.errors import DataError

    file = SCRATCH / "maps.npz"
    file.write_bytes(data[1:] if data[:1] == b"\xff" else npz_of(data))
    with refusals(DataError):
        load_wafer_maps(file)
    with refusals(DataError):
        for _ in itertools.islice(stream_wafer_maps(file), 20):
            pass


def npz_of(data: bytes) -> bytes:
    """A sound file of one of the layouts, some of whose arrays are replaced by what the bytes say."""
    source, packed = io.BytesIO(data), io.BytesIO()
    arrays = {name: _npy(array) for name, array in _sound(_byte(source) % 3).items()}
    for _ in range(_byte(source) % 4):
        name, kind = ARRAYS[_byte(source) % len(ARRAYS)], _byte(source)
        if kind < 16:
            arrays.pop(name, None)
        elif kind < 64:
            arrays[name] = source.read(_byte(source))
        else:
            arrays[name] = _declared(source)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED if len(data) % 2 else zipfile.ZIP_STORED) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return packed.getvalue()


def _sound(layout: int) -> dict[str, np.ndarray]:
    from waferlab.data.maps import CLASS_NAMES

    maps, labels = np.ones((9, 5, 6), np.uint8), np.array(CLASS_NAMES)
    if layout == 0:
        return {"maps": maps, "labels": labels, "group": np.arange(9)}
    if layout == 1:
        return {"arr_0": maps.astype(np.int32), "arr_1": np.eye(9, 8, dtype=np.int32)}
    return {
        "maps_flat": maps.ravel(), "offsets": np.arange(10) * 30, "shapes": np.tile([5, 6], (9, 1)), "labels": labels,
        "group": np.arange(9),
    }  # fmt: skip


def _npy(array: np.ndarray) -> bytes:
    written = io.BytesIO()
    np.lib.format.write_array(written, array, allow_pickle=False)
    return written.getvalue()


def _byte(source: io.BytesIO) -> int:
    return (source.read(1) or b"\0")[0]


def _declared(source: io.BytesIO) -> bytes:
    """An array whose header says one thing, while its content may be another."""
    dtype = DTYPES[_byte(source) % len(DTYPES)]
    sides = [int.from_bytes(source.read(1 + 7 * (_byte(source) > 250)), "little") for _ in range(_byte(source) % 5)]
    order = _byte(source) > 200
    header = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {tuple(sides)}, }}".encode()
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    honest = int(np.prod(sides, dtype=object)) * np.dtype(dtype).itemsize
    size = honest if honest <= 4096 and _byte(source) < 200 else _byte(source)
    return start + source.read(size).ljust(size, b"\1")


def image(data: bytes) -> None:
    """An image, alone and as a folder's; the first byte chooses its name's end."""
    from waferlab.data.image_files import IMAGE_SUFFIXES, choose_levels, read_image
    from waferlab.errors import DataError

    suffixes = sorted(IMAGE_SUFFIXES)
    file = SCRATCH / f"image{suffixes[data[0] % len(suffixes)] if data else '.png'}"
    file.write_bytes(data[1:])
    with refusals(DataError):
        read_image(file, choose_levels([file], "auto"))


def lswmd(data: bytes) -> None:
    """WM-811K's pickle."""
    from waferlab.data.lswmd import read_lswmd

    file = SCRATCH / "LSWMD.pkl"
    file.write_bytes(data)
    with refusals(ValueError):
        read_lswmd(file)


def request(data: bytes) -> None:
    """The body of a request to the service: JSON, or .npy."""
    from waferlab.deployment.request_maps import JSON_TYPE, NPY_TYPES, RefusedRequest, maps_from_body

    for kind in (JSON_TYPE, NPY_TYPES[0]):
        with refusals(RefusedRequest):
            maps_from_body(data, kind)


def model(data: bytes) -> None:
    """A .onnx file to answer with."""
    from waferlab.deployment.predictor import Predictor
    from waferlab.errors import ModelError

    file = SCRATCH / "model.onnx"
    file.write_bytes(data)
    with refusals(ModelError):
        Predictor.load(file).predict([np.ones((5, 6), np.uint8)])


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (options, yaml, npz, image, lswmd, request, model)
}

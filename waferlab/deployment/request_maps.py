"""From the body of a request to wafer maps: a stranger's bytes, so everything is bounded and nothing is guessed.

No answer repeats anything of what was sent: a sentence says which map is meant, what is wrong and what is wanted.
"""

from __future__ import annotations

import asyncio
import io
import json
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from starlette.requests import ClientDisconnect, Request

from waferlab.data.maps import MAX_MAP_SIDE
from waferlab.errors import UserError

MAX_BODY = 8 * 2**20  # bytes; two million dies as JSON, each with a comma and a space, are 6 MB
BODY_SECONDS = 30  # for it to arrive
MAX_MAPS = 1024
MAX_ROWS = 2**18  # of all maps together, in JSON: a row without a die is three bytes long, and takes a hundred
MAX_DIES = 2**21  # of all maps together: 48 of the largest of WM-811K, or a thousand of 45x45
JSON_TYPE, NPY_TYPES = "application/json", ("application/x-npy", "application/octet-stream")
WANTED = (
    f"Send JSON as {JSON_TYPE}, or the bytes of a .npy file as {NPY_TYPES[0]}: uint8, [rows, columns] or "
    "[maps, rows, columns]."
)
JSON_WANTED = 'Wanted: {"maps": [map, ...]}, where a map is a list of rows and a row a list of 0, 1 and 2.'
ABOVE = "below 0 or above 2"

_MAP = {"type": "array", "items": {"type": "array", "items": {"type": "integer", "enum": [0, 1, 2]}}}
_NPY = {"schema": {"type": "string", "format": "binary", "description": WANTED}}
OPENAPI = {  # the body as an OpenAPI document describes it
    "required": True,
    "content": {
        JSON_TYPE: {
            "schema": {
                "type": "object",
                "required": ["maps"],
                "additionalProperties": False,
                "properties": {"maps": {"type": "array", "minItems": 1, "maxItems": MAX_MAPS, "items": _MAP}},
            },
            "example": {"maps": [[[0, 1, 0], [1, 2, 1], [0, 1, 0]]]},
        },
        **dict.fromkeys(NPY_TYPES, _NPY),
    },
}


class RefusedRequest(UserError):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        reason: one of a few words, to count by.
    """

    def __init__(self, sentence: str, *, status: int, reason: str) -> None:
        super().__init__(sentence)
        self.status, self.reason = status, reason


async def read_body(request: Request) -> tuple[bytearray, str]:
    """The body of a request and its media type. Of a body that is too large no more is kept, whatever its head says.

    Raises:
        RefusedRequest: it is too large, too slow, or not of a type that is read here.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON_TYPE, *NPY_TYPES):
        what = "The request has no Content-Type." if not kind else "The request's Content-Type is not one of these."
        raise RefusedRequest(f"{what} {WANTED}", status=415, reason="content type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RefusedRequest("The body is compressed. Send it as it is.", status=415, reason="content type")
    said, body = request.headers.get("content-length", "0"), bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if said.isdecimal() and int(said) > MAX_BODY:
                raise _too_large()
            async for chunk in request.stream():
                if len(body) + len(chunk) > MAX_BODY:
                    raise _too_large()
                body += chunk
    except TimeoutError as error:
        sentence = f"The body did not arrive within {BODY_SECONDS} seconds. Send the maps in several requests."
        raise RefusedRequest(sentence, status=408, reason="too slow") from error
    except ClientDisconnect as error:  # nobody is there any more to read this
        raise RefusedRequest("The body ended too early.", status=400, reason="cut off") from error
    return body, kind


def _too_large() -> RefusedRequest:
    sentence = f"The body has more than {MAX_BODY:,} bytes. Send the maps in several requests."
    return RefusedRequest(sentence, status=413, reason="too large")


def maps_from_body(body: bytes | bytearray, kind: str) -> list[np.ndarray]:
    """The maps of a body, each uint8 [rows, columns] of 0, 1 and 2.

    Args:
        body: at most `MAX_BODY` bytes.
        kind: as `read_body` gives it.

    Raises:
        RefusedRequest: the body is something else.
    """
    maps = _maps_from_json(body) if kind == JSON_TYPE else _maps_from_npy(body)
    for i, one in enumerate(maps):
        if one.max() > 2:
            _refuse(f"map {i} has dies {ABOVE}. Wanted: 0 no die, 1 pass, 2 fail.")
    return maps


def _maps_from_json(body: bytes | bytearray) -> list[np.ndarray]:
    if body.count(b"[") > MAX_ROWS or body.count(b'"') + body.count(b"{") > MAX_MAPS:
        sentence = f"The body has more than {MAX_ROWS:,} rows, or more names than maps have. {JSON_WANTED}"
        raise RefusedRequest(sentence, status=413, reason="too large")
    try:
        asked = json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and numbers of thousands of digits
        what = "nested too deeply" if isinstance(error, RecursionError) else "not JSON"
        raise RefusedRequest(f"The body is {what}. {JSON_WANTED}", status=400, reason="not JSON") from error
    if not isinstance(asked, dict) or asked.keys() != {"maps"} or not isinstance(asked["maps"], list):
        _refuse(f"The body is not an object that holds a list of maps, and nothing else. {JSON_WANTED}")
    _check_sizes([(len(rows), len(rows[0])) if _has_rows(rows) else _no_map(i) for i, rows in enumerate(asked["maps"])])
    return [_map_from_rows(rows, i) for i, rows in enumerate(asked["maps"])]


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are no JSON")


def _has_rows(rows: Any) -> bool:
    return isinstance(rows, list) and len(rows) > 0 and all(isinstance(row, list) for row in rows)


def _no_map(i: int) -> NoReturn:
    _refuse(f"map {i} is not a list of rows. {JSON_WANTED}")


def _map_from_rows(rows: list[list[Any]], i: int) -> np.ndarray:
    columns = len(rows[0])
    if any(len(row) != columns for row in rows):
        _refuse(f"map {i} has rows of different lengths. Wanted: rows of one length, with 0 where there is no die.")
    dies = list(chain.from_iterable(rows))
    if not {*map(type, dies)} <= {int}:  # True and 1.0 would pass for 1
        _refuse(f"map {i} has dies that are not whole numbers. {JSON_WANTED}")
    try:
        return np.frombuffer(bytes(dies), dtype=np.uint8).reshape(len(rows), columns)
    except (ValueError, OverflowError):
        _refuse(f"map {i} has dies {ABOVE}. {JSON_WANTED}")


def _maps_from_npy(body: bytes | bytearray) -> list[np.ndarray]:
    shape, fortran_order, dtype, start = _npy_header(body)
    if dtype != np.uint8 or len(shape) not in (2, 3):
        _refuse(f"The array is not uint8 with two or three dimensions. {WANTED}")
    rows_columns = shape[-2:]
    _check_sizes([rows_columns] * (shape[0] if len(shape) == 3 and shape[0] <= MAX_MAPS else 1), of=shape)
    dies = np.frombuffer(body, dtype=np.uint8, offset=start)
    if len(dies) != int(np.prod(shape)):
        sentence = "The body has more or fewer bytes than the .npy header's shape asks for. Send the whole file."
        raise RefusedRequest(sentence, status=400, reason="not .npy")
    array = dies.reshape(shape, order="F" if fortran_order else "C")
    return list(array) if array.ndim == 3 else [array]


def _npy_header(body: bytes | bytearray) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order and dtype that a .npy file says it has, and where its numbers start; no array is made yet."""
    opened = io.BytesIO(body[: 2**17])
    try:
        version = np.lib.format.read_magic(opened)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(opened)  # of at most 10,000 characters, read as a literal
    except Exception as error:  # a header is Python source, and there are many ways for that to be wrong
        raise RefusedRequest(f"The body is not a .npy file. {WANTED}", status=400, reason="not .npy") from error
    return tuple(map(int, shape)), fortran_order, dtype, opened.tell()  # True would pass for a side, too


def _check_sizes(sizes: list[tuple[int, int]], *, of: tuple[int, ...] = ()) -> None:
    """Raises RefusedRequest unless so many maps of these rows and columns are welcome; `of` is a .npy file's shape."""
    n_maps = of[0] if len(of) == 3 else len(sizes)
    if n_maps < 1:
        _refuse("There is no map. Send at least one.")
    if n_maps > MAX_MAPS:
        _refuse(f"There are more than {MAX_MAPS:,} maps. Send them in several requests.", status=413)
    for i, (rows, columns) in enumerate(sizes):
        if not (1 <= rows <= MAX_MAP_SIDE and 1 <= columns <= MAX_MAP_SIDE):
            _refuse(
                f"map {i} has a side without a die or of more than {MAX_MAP_SIDE:,}. Wanted: less, and at least one."
            )
    if sum(rows * columns for rows, columns in sizes) > MAX_DIES:
        _refuse(f"The maps have more than {MAX_DIES:,} dies together. Send them in several requests.", status=413)


def _refuse(sentence: str, *, status: int = 422) -> NoReturn:
    raise RefusedRequest(sentence, status=status, reason="too large" if status == 413 else "not maps")

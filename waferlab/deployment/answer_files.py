"""Answers as rows of a file: CSV, Parquet or JSON lines. Whole, or as far as they came under another name."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from waferlab.data.streaming import MapChunk
from waferlab.deployment.predictor import Answers
from waferlab.errors import RunError, UserError
from waferlab.reports.tables import no_formula
from waferlab.tracking.whole_files import sweep_up, temporary

ROWS_OF_A_GROUP = 20_000  # of a Parquet file; smaller ones take longer to read
Columns = dict[str, Sequence[Any]]


class _File(Protocol):
    """Takes the columns of some rows; after an error, `close` leaves the rows that were written whole."""

    def write(self, columns: Columns) -> None: ...

    def close(self) -> None: ...


class AnswerFile:
    """A file that answers are written to as they come.

    Attributes:
        path: of the file that there is in the end.
        maps: how many have been written.
    """

    def __init__(self, path: Path, file: _File) -> None:
        self.path, self.maps, self._file = path, 0, file

    def write(self, chunk: MapChunk, answers: Answers) -> None:
        """Adds a row for each map.

        Raises:
            RunError: the disk is full, or gone.
        """
        try:
            self._file.write(_columns(chunk, answers))
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written on ({error.strerror or error}).") from error
        self.maps += len(answers)


def check_name(path: Path) -> None:
    """Raises UserError unless the file's suffix is one of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--output {path}: unknown kind of file {path.suffix!r}. Allowed: {', '.join(FORMATS)}.")
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder. Give the name of a file.")


@contextmanager
def answer_file(path: Path, class_names: Sequence[str]) -> Iterator[AnswerFile]:
    """A file that takes the place of an old one at the end of the block, in one step.

    Where the block does not come to its end, the old one stays, and the rows so far are kept as `<path>.partial`; the
    error, or Ctrl-C, then says so.

    Raises:
        UserError: the suffix is unknown, or the folder cannot be written to.
    """
    check_name(path)
    half = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.unlink(missing_ok=True)  # a link of that name would lead elsewhere
        sweep_up(path.parent, f".{glob.escape(path.name)}.*.tmp")
        file = FORMATS[path.suffix.lower()](half, class_names)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error}). Give another.") from error
    answers = AnswerFile(path, file)
    try:
        yield answers
        file.close()
        os.replace(half, path)
    except BaseException as error:
        with not_stopped():
            kept = _keep(half, answers, file)
        if isinstance(error, UserError | RunError | KeyboardInterrupt):
            raise type(error)(f"{error} {kept}".strip()) from error
        if isinstance(error, OSError):
            raise RunError(f"{path}: cannot be written ({error.strerror or error}). {kept}") from error
        raise
    finally:
        half.unlink(missing_ok=True)


@contextmanager
def not_stopped() -> Iterator[None]:
    """Ignores what stops a program, such as a second Ctrl-C, in a block that is short and ends it anyway."""
    if threading.current_thread() is not threading.main_thread():  # which alone may
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep(half: Path, answers: AnswerFile, file: _File) -> str:
    """Keeps the rows so far under the name of a part; says in a sentence what has become of them."""
    partial = answers.path.with_name(f"{answers.path.name}.partial")
    with suppress(Exception):  # whatever else goes wrong, what went wrong first is what is said
        file.close()
        if answers.maps:
            os.replace(half, partial)
            return f"The answers to the first {answers.maps:,} maps are kept in {partial}."
    return "No answer was kept."


def _columns(chunk: MapChunk, answers: Answers) -> Columns:
    """The table's columns by name; None where something is not known."""
    no_sets = [None] * len(answers)
    return {
        "id": chunk.ids,
        "lot": [lot or None for lot in chunk.lots],
        "class": answers.classes,
        **{f"p_{name}": answers.probabilities[:, i] for i, name in enumerate(answers.class_names)},
        "set": no_sets if answers.sets is None else ["|".join(names) for names in answers.set_names()],
        "abstain": no_sets if answers.sets is None else answers.abstains.tolist(),
    }


def _rounded(columns: Columns) -> Iterator[tuple[Any, ...]]:
    """Row by row, probabilities as numbers of six decimals."""
    plain = (
        np.round(column.astype(np.float64), 6).tolist() if isinstance(column, np.ndarray) else column
        for column in columns.values()
    )
    return zip(*plain, strict=True)


class _TextFile:
    """Lines of text; an error in the midst of some rows takes these rows away again."""

    def __init__(self, path: Path) -> None:
        self._file, self._whole = path.open("wb", buffering=0), 0

    def append(self, text: str) -> None:
        left = whole = memoryview(text.encode(errors="backslashreplace"))
        while left:
            left = left[self._file.write(left) :]
        self._whole += len(whole)

    def close(self) -> None:
        if not self._file.closed:
            self._file.truncate(self._whole)
            self._file.close()


class _Csv(_TextFile):
    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        super().__init__(path)
        names = [f"p_{name}" for name in class_names]
        self._append([["id", "lot", "class", *names, "set", "abstain"]])

    def write(self, columns: Columns) -> None:
        words = {None: None, True: "true", False: "false"}
        self._append([*map(no_formula, row[:-1]), words[row[-1]]] for row in _rounded(columns))

    def _append(self, rows: Any) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self.append(text.getvalue())


class _JsonLines(_TextFile):
    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        super().__init__(path)

    def write(self, columns: Columns) -> None:
        self.append("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in _rounded(columns)))


class _Parquet:
    """Groups of rows; pyarrow is imported here, since the other formats do without."""

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        text, number = pa.string(), pa.float32()
        fields = {"id": text, "lot": text, "class": text, **{f"p_{name}": number for name in class_names}}
        self._schema = pa.schema(fields | {"set": text, "abstain": pa.bool_()})
        self._writer, self._waiting, self._rows = parquet.ParquetWriter(path, self._schema), [], 0

    def write(self, columns: Columns) -> None:
        import pyarrow as pa

        self._waiting.append(pa.table(columns, self._schema))
        self._rows += len(columns["id"])
        if self._rows >= ROWS_OF_A_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa

        if self._waiting:
            group, self._waiting, self._rows = pa.concat_tables(self._waiting), [], 0
            self._writer.write_table(group)

    def close(self) -> None:
        if self._writer.is_open:
            self._write_group()
            self._writer.close()


FORMATS = {".csv": _Csv, ".parquet": _Parquet, ".jsonl": _JsonLines}

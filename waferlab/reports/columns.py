"""A table of a report as the terminal shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as Shown
from rich.text import Text

from waferlab.errors import printable
from waferlab.reports.tables import Table

BETWEEN = 2  # characters between two columns
WORDS = 20  # characters that a column of words is content with: longer ones go on in the next line


class InColumns:
    """Compact: numbers to the right, the best row bold.

    A table that is too wide comes in parts, one below the other, each with the first column: who reads a figure has to
    see whose it is.

    Args:
        table: to be shown.
        title: above the first part.
    """

    def __init__(self, table: Table, *, title: str | None = None) -> None:
        rows = [[printable(cell) for cell in row] for row in (table.headings, *table.rows)]
        self._table, self._title = replace(table, headings=rows[0], rows=rows[1:]), title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For rich: the parts, as wide as the terminal lets them be."""
        for number, columns in enumerate(self._parts(options.max_width)):
            if number:
                yield Text("")
            yield self._part(columns, title=None if number else self._title)

    def _parts(self, width: int) -> list[list[int]]:
        """The numbers of the columns of each part."""
        first, *others = range(len(self._table.headings))
        parts, used = [[first]], self._width(first)
        for column in others:
            used += BETWEEN + self._width(column)
            if used > width and len(parts[-1]) > 1:
                parts.append([first])
                used = self._width(first) + BETWEEN + self._width(column)
            parts[-1].append(column)
        return parts

    def _width(self, column: int) -> int:
        """Characters that a column wants."""
        rows = [self._table.headings, *self._table.rows]
        widest = max(len(line) for row in rows for line in row[column].splitlines() or [""])
        return widest if column == 0 or self._table.is_number(column) else min(widest, WORDS)

    def _part(self, columns: Sequence[int], *, title: str | None) -> Shown:
        table = self._table
        shown = Shown(title=title, box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
        for column in columns:
            number = table.is_number(column)
            # Text, because rich would read brackets in a plain string, as in "resnet[small]", as markup.
            shown.add_column(
                Text(table.headings[column]), justify="right" if number else "left", no_wrap=number, overflow="fold",
                min_width=self._width(0) if column == 0 else None,
            )  # fmt: skip
        for index, row in enumerate(table.rows):
            cells = [Text(row[column]) for column in columns]
            shown.add_row(*cells, style="bold" if index == table.best else None)
        return shown

"""A table of a report as the terminal shows it."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table as Shown
from rich.text import Text

from waferlab.reports.tables import Table


def in_columns(table: Table, *, title: str | None = None) -> Shown:
    """Compact: numbers to the right, the best row bold."""
    shown = Shown(title=title, box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    for column, heading in enumerate(table.headings):
        number = table.is_number(column)
        # Text, because rich would read brackets in a plain string, as in "resnet[small]", as markup.
        shown.add_column(Text(heading), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for index, row in enumerate(table.rows):
        shown.add_row(*map(Text, row), style="bold" if index == table.best else None)
    return shown

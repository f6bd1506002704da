"""How all pictures look."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from PIL import Image

from waferlab.tracking.whole_files import write_atomically

# Okabe & Ito's palette, told apart with every common form of colour blindness: https://jfly.uni-koeln.de/color/
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
INK, MUTED, GRID = "#222222", "#6B7280", "#E2E5EA"
PASS_COLOUR, FAIL_COLOUR, WAFER_COLOUR = "#B9CBDD", "#C8371B", "#8A94A3"
THEME = {
    "figure.dpi": 150, "savefig.dpi": 150, "figure.facecolor": "white", "figure.titlesize": 16,
    "figure.titleweight": "bold", "text.color": INK, "axes.labelcolor": INK, "axes.labelsize": 11,
    "axes.titlecolor": INK, "axes.titlesize": 11.5, "axes.edgecolor": WAFER_COLOUR, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "grid.color": GRID, "xtick.color": INK, "ytick.color": INK,
    "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.frameon": False, "legend.fontsize": 10,
    "legend.title_fontsize": 10,
}  # fmt: skip


@contextmanager
def theme() -> Iterator[None]:
    """Sets matplotlib's parameters for a `with` block or, as decorator, a function, and then back to what they were."""
    with matplotlib.rc_context(THEME):
        yield


def model_colours(number: int) -> list[str]:
    """A colour for each of so many models, the same in every picture."""
    return [PALETTE[index % len(PALETTE)] for index in range(number)]


def shorten(name: str, length: int) -> str:
    """The name, cut with an ellipsis where it is longer; its dollars as such: between two, matplotlib sees maths."""
    return (name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$")


def wrap(text: str, width: int) -> str:
    """The text in lines of at most so many characters, its dollars as such."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def wrap_name(name: str, width: int) -> str:
    """The name in lines of at most so many characters, broken after underscores where there are any."""
    return wrap(name.replace("_", "_ "), width).replace("_ ", "_")


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches whose parts find their own places."""
    # A bare Figure draws with Agg and belongs to nobody: no pyplot, no window, nothing to close.
    figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.03))
    figure.suptitle(title)
    return figure


def style(axes: Axes, x_label: str, *, grid: str) -> None:
    """Labels the x axis and draws grid lines; `grid` is "x", "y" or "both"."""
    axes.set_xlabel(x_label)
    axes.grid(axis=grid)


def say_so(axes: Axes, text: str) -> None:
    """Writes into empty axes why they are empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set(xticks=[], yticks=[])


def draw_estimate(
    axes: Axes, row: float, value: float, interval: Sequence[float] | None, *, colour: str, marker: str = "o",
    face: str | None = None, form: str = "{:.3f}",
) -> None:  # fmt: skip
    """A row's value with its number above it and, if there is one, its interval as a bar."""
    if interval is not None:  # a line from low to high: an interval over seeds need not contain the value itself
        axes.plot(interval, [row, row], "-|", color=colour, linewidth=2.5, markersize=11, markeredgewidth=2.5)
    edge = {"markeredgecolor": colour if face else "white", "markeredgewidth": 1.8 if face else 1}
    axes.plot(value, row, marker, color=face or colour, markersize=9, **edge)
    above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
    above["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a line may pass behind it
    axes.annotate(form.format(value).replace("-", "−"), (value, row), fontsize=10, **above)


def legend_below(figure: Figure, colours: Mapping[str, str], *more: Line2D, note: str = "") -> None:
    """One legend below all panels instead of one in each: a note, a colour for each name, then other signs."""
    handles = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]
    columns = 4 if max(map(len, colours), default=0) <= 30 else 2
    legend = figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=columns, title=note)
    legend.get_title().set(color=MUTED, multialignment="center")


def save(figure: Figure, path: str | os.PathLike[str], *, colours: int | None = None) -> Path:
    """Writes the figure as PNG, whole or not at all.

    Args:
        figure: that is drawn.
        path: the file to write.
        colours: keep only so many, 2 to 256: a large sheet of few colours is then a fifth of the size.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    if colours is not None:
        few = Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        few.save(buffer := io.BytesIO(), format="png", optimize=True)
    return write_atomically(path, buffer.getvalue())

"""How all pictures look."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from waferlab.records import write_atomically

# Okabe & Ito's palette, told apart with every common form of colour blindness: https://jfly.uni-koeln.de/color/
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
INK, MUTED, GRID = "#222222", "#6B7280", "#E2E5EA"
PASS_COLOUR, FAIL_COLOUR, WAFER_COLOUR = "#B9CBDD", "#C8371B", "#8A94A3"
DPI = 150


def model_colours(number: int) -> list[str]:
    """A colour for each of so many models, the same in every picture."""
    return [PALETTE[index % len(PALETTE)] for index in range(number)]


def shorten(name: str, length: int) -> str:
    """The name, cut with an ellipsis where it is longer."""
    return name if len(name) <= length else name[: length - 1] + "…"


def wrap_name(name: str, width: int) -> str:
    """The name in lines of at most so many characters, broken after underscores where there are any."""
    return "\n".join(textwrap.wrap(name.replace("_", "_ "), width)).replace("_ ", "_")


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches whose parts find their own places."""
    # A bare Figure draws with Agg and belongs to nobody: no pyplot, no window, nothing to close.
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.03)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK)
    return figure


def style(axes: Axes, x_label: str, *, grid: str) -> None:
    """What all axes have in common; `grid` is "x", "y" or "both"."""
    axes.set_xlabel(x_label, color=INK, fontsize=11)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(WAFER_COLOUR)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes the figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
    return write_atomically(path, buffer.getvalue())

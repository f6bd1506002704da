"""The contact sheet of an audit of labels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from waferlab.reports.style import INK, MUTED, PALETTE, save, shorten, theme
from waferlab.reports.wafers import draw_wafer, wafer_sheet

TILES_IN_A_ROW = 10


@theme()
def plot_suspects(
    maps: Sequence[np.ndarray],
    captions: Sequence[tuple[str, str, float]],
    *,
    path: str | os.PathLike[str],
    title: str = "Labels that are likeliest wrong",
) -> Path:
    """Draws wafers ten in a row, each with the class it was given and the class that networks give it (PNG).

    Args:
        maps: uint8 [rows, columns], 0 no die / 1 pass / 2 fail, any sizes; one at the least.
        captions: of each map the class given, the likeliest class, and the probability of that.
        path: the PNG to write.
        title: the figure's title.
    """
    tile_width, tile_height, header, radius = 1.32, 1.72, 0.75, 0.56  # inches
    n_columns = min(TILES_IN_A_ROW, len(maps))
    width = max(n_columns * tile_width + 0.3, 7.3)
    height = header + math.ceil(len(maps) / n_columns) * tile_height + 0.1
    figure, sheet = wafer_sheet(width, height, title=title, y=0.32)
    for number, (one, (given, called, probability)) in enumerate(zip(maps, captions, strict=True)):
        row, column = divmod(number, n_columns)
        x, y = 0.15 + (column + 0.5) * tile_width, header + row * tile_height + radius + 0.05
        draw_wafer(sheet, np.asarray(one), x=x, y=y, radius=radius)
        share = ">99%" if probability > 0.995 else f"{probability:.0%}"  # a rounded 100% would claim certainty
        lines = ((f"given {shorten(given, 12)}", INK), (f"{shorten(called, 12)} {share}", PALETTE[0]))
        for line, (text, colour) in enumerate(lines):
            sheet.text(x, y + radius + 0.15 + 0.16 * line, text, fontsize=8.5, color=colour, ha="center", va="center")
        sheet.text(x - radius, y - radius + 0.05, str(number + 1), fontsize=7, color=MUTED, ha="center")
    return save(figure, path, colours=64)

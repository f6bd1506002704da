"""The pictures of explanations: what a model looked at, and what becomes of its answer without that."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from waferlab.reports.style import (
    FAIL_COLOUR,
    MUTED,
    PALETTE,
    PASS_COLOUR,
    legend_below,
    new_figure,
    save,
    shorten,
    style,
    theme,
)
from waferlab.reports.wafers import die_colours, draw_wafer

PALE_PASS, PALE_FAIL = "#EEF1F5", "#B4BBC6"  # under the relevance, so that only it has colour
HEAT = "YlOrRd"


@theme()
def plot_relevance(
    maps: Sequence[np.ndarray],
    relevance: Sequence[np.ndarray],
    captions: Sequence[tuple[str, str, float]],
    *,
    path: str | os.PathLike[str],
    title: str = "What the model looked at",
) -> Path:
    """Draws each wafer and, beside it, which of its dies speak for the class that the model names (PNG).

    Args:
        maps: uint8 [rows, columns], 0 no die / 1 pass / 2 fail, any sizes.
        relevance: of each map, float32 of its shape; only what is above 0 is drawn, as shares of the map's highest.
        captions: of each map its class, what it is called, and the class's probability.
        path: the PNG to write.
        title: the figure's title.
    """
    n_columns = min(3, len(maps)) or 1
    pair, tile_height, header, radius = 3.5, 2.3, 0.85, 0.78  # inches
    width, height = max(n_columns * pair + 0.3, 7.3), header + math.ceil(len(maps) / n_columns) * tile_height + 0.1
    figure = Figure((width, height))
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    sheet.set_axis_off()
    sheet.text(0.25, 0.3, title, fontsize=16, fontweight="bold", va="center")
    heat = matplotlib.colormaps[HEAT]
    signs = [Patch(color=PASS_COLOUR, label="die passed"), Patch(color=FAIL_COLOUR, label="die failed")]
    signs += [Patch(color=heat(share), label=text) for share, text in ((0.3, "speaks for the class"), (0.9, "most"))]
    place = {"loc": "center left", "bbox_to_anchor": (0.13, 0.63), "bbox_transform": sheet.transData}
    sheet.legend(handles=signs, ncols=4, **place)
    for number, (one, found, caption) in enumerate(zip(maps, relevance, captions, strict=True)):
        row, column = divmod(number, n_columns)
        x, y = 0.15 + column * pair + pair / 4, header + row * tile_height + radius + 0.15
        draw_wafer(sheet, one, x=x, y=y, radius=radius)
        draw_wafer(sheet, one, x=x + 1.68, y=y, radius=radius, colours=_heated(one, found))
        name, called, probability = caption
        share = ">99%" if probability > 0.995 else f"{probability:.0%}"  # a rounded 100% would claim certainty
        middle, below = x + 0.84, y + radius + 0.22
        sheet.text(middle, below, f"{shorten(name, 20)}  {share}", fontsize=11, fontweight="bold", ha="center")
        sheet.text(middle, below + 0.19, shorten(called, 40), fontsize=9, color=MUTED, ha="center")
    return save(figure, path)


def _heated(one_map: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Colours of dies, uint8 [rows, columns, 4]: grey where nothing speaks for the class, else the hotter the more."""
    share = np.clip(relevance, 0, None) / max(float(relevance.max(initial=0)), 1e-12)
    cover = np.clip(share / 0.25, 0, 1)[..., None]  # from a quarter of the highest on, the grey is gone
    heat = matplotlib.colormaps[HEAT](0.15 + 0.85 * share)[..., :3] * 255
    heat = np.where((one_map == 2)[..., None], heat * 0.8, heat)  # failing dies stay told apart
    colours = die_colours(one_map, PALE_PASS, PALE_FAIL)
    colours[..., :3] = (1 - cover) * colours[..., :3] + cover * heat
    return colours


@theme()
def plot_deletion(
    classes: Mapping[str, Mapping[str, Any]], *, path: str | os.PathLike[str], title: str = "Failing dies taken away"
) -> Path:
    """Draws a class's mean probability against the share of failing dies that are made to pass, a panel a class (PNG).

    Args:
        classes: of each, shares, by_relevance and at_random (equally long), area, area_interval ([low, high] or None),
            maps and lots.
        path: the PNG to write.
        title: the figure's title.
    """
    columns = min(3, len(classes))
    rows = math.ceil(len(classes) / columns)
    figure = new_figure(4.2 * columns + 0.4, 2.9 * rows + 1.4, title)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colours = {"most relevant first": FAIL_COLOUR, "at random": MUTED}
    for axes, (name, found) in zip(panels.flat, classes.items(), strict=False):
        shares = np.array(found["shares"]) * 100
        axes.fill_between(shares, found["by_relevance"], found["at_random"], color=PALETTE[4], alpha=0.18, linewidth=0)
        axes.plot(shares, found["at_random"], color=MUTED, linewidth=2)
        axes.plot(shares, found["by_relevance"], color=FAIL_COLOUR, linewidth=2.5)
        style(axes, "failing dies made to pass (%)" if axes.get_subplotspec().is_last_row() else "", grid="y")
        axes.set(xlim=(0, 100), ylim=(0, 1.02))
        interval = found["area_interval"]
        bounds = "one lot, no interval" if interval is None else "{:+.2f} to {:+.2f}".format(*interval)
        axes.set_title(f"{name}: {found['area']:+.2f} ({bounds})".replace("-0.", "−0."), loc="left", pad=18)
        axes.text(0, 1.03, f"{found['maps']} maps, {found['lots']} lots", transform=axes.transAxes, color=MUTED)
    for axes in panels.flat[len(classes) :]:
        axes.set_axis_off()
    figure.supylabel("mean probability of the predicted class", fontsize=11)
    between = Line2D(
        [], [], color=PALETTE[4], alpha=0.4, linewidth=8, label="area between, in the titles (95% interval over lots)"
    )
    legend_below(figure, colours, between)
    return save(figure, path)

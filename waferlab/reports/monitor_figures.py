"""The pictures of a batch beside the validation part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from waferlab.reports.style import INK, MUTED, PALETTE, legend_below, new_figure, save, style, theme, wrap_name
from waferlab.reports.tables import Record

REFERENCE, BATCH = MUTED, PALETTE[1]
NAMES = {"Validation": REFERENCE, "This batch": BATCH}


@theme()
def plot_class_mix(mix: Sequence[Record], *, path: str | os.PathLike[str]) -> Path:
    """Draws the share of each class in the validation part and, with its interval, that estimated for a batch (PNG).

    Args:
        mix: of each class: name, reference, estimated, interval (None where there is none), shares in 0..1.
        path: the PNG to write.
    """
    figure = new_figure(9, 1.9 + 0.5 * len(mix), "Class mix")
    axes = figure.subplots()
    for row, one in enumerate(mix):
        if one["interval"] is not None:
            axes.plot(one["interval"], [row, row], "-|", color=BATCH, linewidth=2.5, markersize=10, markeredgewidth=2.5)
        axes.plot(one["reference"], row, "D", color="white", markeredgecolor=REFERENCE, markeredgewidth=2, markersize=9)
        axes.plot(one["estimated"], row, "o", color=BATCH, markeredgecolor="white", markersize=9)
    axes.set_yticks(range(len(mix)), [wrap_name(one["name"], 28) for one in mix])
    axes.set(ylim=(len(mix) - 0.5, -0.5), xlim=(-0.01, None))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    style(axes, "Share of the maps", grid="x")
    hollow = {"color": "white", "markeredgecolor": REFERENCE, "markeredgewidth": 2}
    validation = Line2D([], [], marker="D", linestyle="", label="Validation", **hollow)
    estimated = "This batch, estimated, with 95% interval over lots"
    batch = Line2D([], [], marker="o", linewidth=2.5, color=BATCH, label=estimated)
    legend_below(figure, {}, validation, batch)
    return save(figure, path)


@theme()
def plot_distributions(
    pairs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], *, path: str | os.PathLike[str], title: str,
    top: float | None = None,
) -> Path:  # fmt: skip
    """Draws, for each quantity, which share of the maps is at or below each value: validation and batch (PNG).

    Args:
        pairs: by the label of the x axis, of the validation part and of the batch the values of their maps, float [N],
            and how many maps each stands for, float [N].
        path: the PNG to write.
        title: of the figure.
        top: the highest value drawn; None for that of which 99.5% of the maps on both sides stay below.
    """
    figure = new_figure(max(8.0, 4.2 * len(pairs)), 4.4, title)
    for axes, (label, sides) in zip(
        np.atleast_1d(figure.subplots(1, len(pairs), sharey=True)), pairs.items(), strict=True
    ):
        end = float(top if top is not None else max(np.quantile(values, 0.995) for values, _ in sides)) or 1.0
        for (values, weights), colour, width in zip(sides, NAMES.values(), (3.5, 2), strict=True):
            order = np.argsort(values)
            ordered, below = values[order], np.cumsum(weights[order], dtype=np.float64)
            x = np.concatenate([[0], ordered, [max(end, ordered[-1])]])
            y = np.concatenate([[0], below / below[-1], [1]])
            axes.step(x, y, where="post", color=colour, linewidth=width)
        axes.set(xlim=(0, end), ylim=(0, 1.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        style(axes, label, grid="both")
    first = figure.axes[0]
    first.set_ylabel("Maps at or below", color=INK)
    legend_below(figure, NAMES)
    return save(figure, path)

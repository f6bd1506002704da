"""The pictures of a run."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from waferlab.evaluation.metrics import divide
from waferlab.evaluation.predictions import Predictions
from waferlab.evaluation.risk_coverage import risk_coverage
from waferlab.reports.style import (
    FAIL_COLOUR,
    GRID,
    INK,
    MUTED,
    PALETTE,
    draw_estimate,
    legend_below,
    model_colours,
    new_figure,
    save,
    say_so,
    shorten,
    style,
    theme,
    wrap,
    wrap_name,
)
from waferlab.reports.wafers import draw_wafer, wafer_sheet

TILES_IN_A_ROW = 6
Caption = Sequence[tuple[str, str]]  # lines, each with its colour
Tile = tuple[np.ndarray, Caption]  # a wafer map and what stands below it
TRAIN_LINE = (0, (4, 2))  # dashes; validation is solid


@theme()
def plot_confusion_matrix(
    predictions: Predictions, *, path: str | os.PathLike[str], title: str = "Confusion matrix"
) -> Path:
    """Draws counts and shares of the true class side by side (PNG); rows are true, columns predicted classes."""
    counts = predictions.confusion()
    shares = divide(counts, np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape))
    side = float(np.clip(0.6 * len(counts), 3.6, 14))  # inches
    figure = new_figure(2 * side + 2.4, side + 1.8, title)
    left, right = figure.subplots(1, 2)
    names = [shorten(name, 32) for name in predictions.class_names]
    # Shaded by logarithm, or the commonest class would hide all others; a single map stands out from none.
    scale = LogNorm(vmin=0.5, vmax=max(2, counts.max()))
    _draw_matrix(left, counts, names, fmt=",", norm=scale)
    _draw_matrix(right, shares, names, fmt=".2f", vmin=0, vmax=1)
    left.set_title(f"Number of maps ({counts.sum():,} in all, shaded on a log scale)")
    right.set_title("Share of each true class (diagonal: recall)")
    return save(figure, path)


def _draw_matrix(axes: Axes, values: np.ndarray, names: Sequence[str], **shade: Any) -> None:
    """Empty cells stay empty: the eye finds the errors at once."""
    import seaborn

    size = 9.0 if len(names) <= 20 else 6.0
    cells = {"annot": True, "annot_kws": {"size": size}, "linewidths": 0.5, "linecolor": GRID, "square": True}
    none = {"cbar": False, "xticklabels": False, "yticklabels": False}
    seaborn.heatmap(values, mask=values == 0, cmap="Blues", ax=axes, **cells, **none, **shade)
    centres = np.arange(len(names)) + 0.5
    axes.set_xticks(centres, names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(centres, names)
    axes.tick_params(length=0, labelsize=size + 1)
    axes.set(xlabel="Predicted class", ylabel="True class")


@theme()
def plot_sample_predictions(
    wafer_maps: Sequence[np.ndarray],
    predictions: Predictions,
    *,
    path: str | os.PathLike[str],
    title: str = "Sample predictions",
    seed: int = 0,
) -> Path:
    """Draws up to 12 wafers that the model got right, one of each class first, and its 12 most confident errors (PNG).

    Args:
        wafer_maps: N maps in the order of the predictions, uint8 [h, w], 0 no die / 1 pass / 2 fail, any sizes.
        predictions: of the same maps.
        path: the PNG to write.
        title: the figure's title.
        seed: chooses among the right ones.

    Raises:
        ValueError: if the number of maps is not the number of predictions.
    """
    if len(wafer_maps) != len(predictions.labels):
        raise ValueError(f"{len(wafer_maps)} wafer maps for {len(predictions.labels)} predictions: pass one for each")
    right, wrong = _pick_samples(predictions, limit=2 * TILES_IN_A_ROW, seed=seed)
    n_right = int((predictions.predicted == predictions.labels).sum())
    n_wrong = len(predictions.labels) - n_right

    def tiles(chosen: Sequence[int], colour: str) -> list[Tile]:
        return [(wafer_maps[index], _caption(predictions, index, colour)) for index in chosen]

    sections = (
        (f"Right: {len(right)} of {n_right:,}" if right else "Right: none", PALETTE[0], tiles(right, PALETTE[0])),
        (
            f"Wrong: {len(wrong)} of {n_wrong:,}, most confident first" if wrong else "Wrong: none",
            FAIL_COLOUR,
            tiles(wrong, FAIL_COLOUR),
        ),
    )
    return save(_draw_sheet(title, sections), path)


@theme()
def plot_least_certain(
    wafer_maps: Sequence[np.ndarray],
    captions: Sequence[tuple[str, str, float, str]],
    *,
    path: str | os.PathLike[str],
    title: str = "Least certain maps",
) -> Path:
    """Draws wafers, the least certain first, with what was said of them (PNG).

    Args:
        wafer_maps: uint8 [h, w], 0 no die / 1 pass / 2 fail, any sizes.
        captions: of each its name, its likeliest class, that class's probability, its prediction set or "".
        path: the PNG to write.
        title: the figure's title.
    """
    tiles = [
        (
            one,
            (
                (shorten(name, 24), INK),
                (f"{shorten(called, 18)} {_percent(probability)}", PALETTE[0]),
                (shorten(among, 26), MUTED),
            ),
        )
        for one, (name, called, probability, among) in zip(wafer_maps, captions, strict=True)
    ]
    return save(_draw_sheet(title, [("By the probability of the likeliest class, least first", MUTED, tiles)]), path)


def _draw_sheet(title: str, sections: Sequence[tuple[str, str, Sequence[Tile]]]) -> Figure:
    """Wafers in rows of six, in sections with a heading and its colour."""
    tile_width, tile_height, header, heading = 2.1, 2.5, 0.8, 0.45  # inches
    n_rows = sum(math.ceil(len(tiles) / TILES_IN_A_ROW) for _, _, tiles in sections)
    width = TILES_IN_A_ROW * tile_width + 0.3
    height = header + len(sections) * heading + n_rows * tile_height + 0.1
    figure, sheet = wafer_sheet(width, height, title=title, y=0.4)
    top = header
    for text, colour, tiles in sections:
        sheet.text(0.25, top + 0.12, text, fontsize=12, fontweight="bold", color=colour, va="center")
        for position, (wafer_map, caption) in enumerate(tiles):
            row, column = divmod(position, TILES_IN_A_ROW)
            x, y = 0.15 + (column + 0.5) * tile_width, top + heading + row * tile_height + 0.85
            draw_wafer(sheet, np.asarray(wafer_map), x=x, y=y, radius=0.83)
            for number, (line, shade) in enumerate(caption):
                sheet.text(x, y + 1.03 + 0.17 * number, line, fontsize=9, color=shade, ha="center", va="center")
        top += heading + math.ceil(len(tiles) / TILES_IN_A_ROW) * tile_height
    return figure


def _pick_samples(predictions: Predictions, *, limit: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of right predictions (one of each class, then a second, ...) and of the most confident errors."""
    hit = predictions.predicted == predictions.labels
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(hit))
    by_class = [shuffled[predictions.labels[shuffled] == label] for label in range(len(predictions.class_names))]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_class))
    right = [int(index) for index in turns if index is not None][:limit]
    errors = np.flatnonzero(~hit)
    wrong = errors[np.argsort(-predictions.confidence[errors], kind="stable")][:limit]
    return right, wrong.tolist()


def _caption(predictions: Predictions, index: int, colour: str) -> Caption:
    names = predictions.class_names
    return (
        (f"true {shorten(names[predictions.labels[index]], 18)}", INK),
        (f"predicted {shorten(names[predictions.predicted[index]], 18)}", colour),
        (f"confidence {_percent(float(predictions.confidence[index]))}", MUTED),
    )


def _percent(share: float) -> str:
    return ">99%" if share > 0.995 else f"{share:.0%}"  # a rounded 100% would claim certainty


@theme()
def plot_risk_coverage(
    predictions: Predictions,
    *,
    path: str | os.PathLike[str],
    sets: Mapping[str, Any] | None = None,
    title: str = "Answering only the surest maps",
) -> Path:
    """Draws the error of the answered maps against the share that is answered, the surest first (PNG).

    Args:
        predictions: of one model on the test part.
        path: the PNG to write.
        sets: what `conformal.evaluate_sets` found for its prediction sets, drawn as a point; None leaves it out.
        title: the figure's title.
    """
    curve, colour = risk_coverage(predictions), PALETTE[0]
    figure = new_figure(9.0, 5.0, wrap(title, 52))
    axes = figure.subplots()
    axes.fill_between(curve.answered, *curve.interval.T, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.answered, curve.error, color=colour, linewidth=1.8)
    signs = [Patch(facecolor=colour, alpha=0.15, label="95% interval over lots, of each point by itself")]
    signs.append(_mark(axes, 1.0, curve.error[-1], "o", PALETTE[6], f"all answered: {curve.error[-1]:.1%} wrong"))
    if sets is not None and sets["error_alone"] is not None:
        text = f"prediction sets at {sets['coverage']:.0%}: {sets['alone']:.1%} alone, {sets['error_alone']:.1%} wrong"
        signs.append(_mark(axes, sets["alone"], sets["error_alone"], "D", PALETTE[1], text))
    # The first few maps decide nothing, and their interval is as wide as it can be: they may leave the picture.
    highest = max(curve.error[curve.answered > 0.05].max(), np.nan_to_num(curve.interval[-1, 1]))
    axes.set(xlim=(0, 1.02), ylim=(0, min(1.02, max(0.02, 1.2 * highest))), ylabel="Wrong among the answered maps")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    style(axes, "Answered maps", grid="both")
    legend_below(figure, {"answered in the order of confidence, surest first": colour}, *signs)
    return save(figure, path)


def _mark(axes: Axes, x: float, y: float, marker: str, colour: str, label: str) -> Line2D:
    """A single point, for the legend."""
    (point,) = axes.plot(
        x, y, marker, color=colour, markersize=9, markeredgecolor="white", clip_on=False, zorder=4, label=label
    )
    return point


@theme()
def plot_model_comparison(
    results: Sequence[Mapping[str, Any]],
    *,
    path: str | os.PathLike[str],
    title: str = "Model comparison",
    error_bars: str = "95% interval over lots",
) -> Path:
    """Draws macro F1 with error bars, training time, parameters and latency of each model (PNG).

    Args:
        results: a dict for each model with model_type and any of macro_f1, macro_f1_interval ([low, high] or None),
            train_seconds, n_parameters, latency_ms. What is missing is drawn as "not measured".
        path: the PNG to write.
        title: the figure's title.
        error_bars: what ``macro_f1_interval`` is, for the reader.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError("results are empty: pass a dict for at least one model")
    figure = new_figure(14.5, 2.2 + 0.66 * len(results), title)
    score, *costs = figure.subplots(1, 4, sharey=True, width_ratios=[1.5, 1, 1, 1])
    _draw_scores(score, results, error_bars)
    _draw_costs(costs[0], results, "train_seconds", label="Training time (s)", form=" {:,.1f}")
    _draw_costs(costs[1], results, "n_parameters", label="Parameters (millions)", form=" {:,.2f}", factor=1e-6)
    _draw_costs(costs[2], results, "latency_ms", label="Latency (ms per map)", form=" {:,.2f}")
    names = [wrap_name(str(result["model_type"]), 30) for result in results]
    score.set_yticks(range(len(results)), names, fontsize=11)
    margin = 0.6 if len(results) > 1 else 0.9
    score.set_ylim(len(results) - 1 + margin, -margin)  # first model on top
    return save(figure, path)


def _draw_scores(axes: Axes, results: Sequence[Mapping[str, Any]], error_bars: str) -> None:
    """Dots, not bars: a bar must start at zero, and there the differences that matter could not be seen."""
    ends, label = [], "Macro F1"
    for row, (result, colour) in enumerate(zip(results, model_colours(len(results)), strict=True)):
        value, interval = result.get("macro_f1"), result.get("macro_f1_interval")
        if value is None:
            centre = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center"}
            axes.text(0.5, row, "not measured", fontsize=10, color=MUTED, **centre)
            continue
        if interval is not None:
            label = f"Macro F1\nerror bars: {error_bars}"
        draw_estimate(axes, row, value, interval, colour=colour)
        ends += [value, *(interval or ())]
    if ends:
        margin = max(0.04, 0.12 * (max(ends) - min(ends)))
        axes.set_xlim(max(-0.02, min(ends) - margin), min(1.02, max(ends) + margin))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))  # more labels than that touch each other
    style(axes, label, grid="x")


def _draw_costs(
    axes: Axes, results: Sequence[Mapping[str, Any]], key: str, *, label: str, form: str, factor: float = 1.0
) -> None:
    lengths = [(result.get(key) or 0.0) * factor for result in results]
    axes.barh(range(len(results)), lengths, height=0.55, color=model_colours(len(results)))
    for row, (result, length) in enumerate(zip(results, lengths, strict=True)):
        known = result.get(key) is not None
        text = form.format(length) if known else " not measured"
        axes.text(length, row, text, va="center", fontsize=10, color=INK if known else MUTED)
    axes.set_xlim(0, 1.35 * (max(lengths) or 1.0))  # leaves room for the longest bar's number
    style(axes, label, grid="x")
    axes.tick_params(axis="y", length=0, labelleft=False)


@theme()
def plot_training_history(
    histories: Mapping[str, Mapping[str, Sequence[float | None]]],
    *,
    path: str | os.PathLike[str],
    title: str = "Training history",
) -> Path:
    """Draws loss, macro F1 and, where recorded, the learning rate against the epoch (PNG).

    Args:
        histories: for each model a dict with epoch and any of train_loss, val_loss, train_macro_f1, val_macro_f1,
            learning_rate, each as long as epoch; None or NaN leaves a gap.
        path: the PNG to write.
        title: the figure's title.

    Raises:
        ValueError: if there are no histories, or a series is not as long as its epochs.
    """
    if not histories:
        raise ValueError("histories are empty: pass the history of at least one model")
    panels = [("Loss", {"train_loss": TRAIN_LINE, "val_loss": "-"})]
    panels += [("Macro F1", {"train_macro_f1": TRAIN_LINE, "val_macro_f1": "-"})]
    if any(history.get("learning_rate") is not None for history in histories.values()):
        panels += [("Learning rate (log scale)", {"learning_rate": "-"})]
    figure = new_figure(4.8 * len(panels), 5.0, title)
    colours = dict(zip(histories, model_colours(len(histories)), strict=True))
    for axes, (label, series) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _draw_panel(axes, histories, series, colours)
        axes.set_ylabel(label)
    lines = {"train": TRAIN_LINE, "validation": "-"}
    signs = [Line2D([], [], color=MUTED, linestyle=how, label=part) for part, how in lines.items()]
    star = {"linestyle": "none", "marker": "*", "markersize": 11, "label": "best validation macro F1"}
    legend_below(figure, colours, *signs, Line2D([], [], color=MUTED, **star))
    return save(figure, path)


def _draw_panel(
    axes: Axes, histories: Mapping[str, Mapping[str, Any]], series: Mapping[str, Any], colours: Mapping[str, str]
) -> None:
    """All models' lines of a panel; `series` are their keys, each with its style of line."""
    for model, history in histories.items():
        for key, line_style in series.items():
            _draw_series(axes, model, history, key, colour=colours[model], line_style=line_style)
    style(axes, "Epoch", grid="both")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if "learning_rate" in series:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0e}")  # typesetting powers of ten would take a quarter of a second
    if not axes.lines:
        say_so(axes, "not recorded")


def _draw_series(axes: Axes, model: str, history: Mapping[str, Any], key: str, *, colour: str, line_style: Any) -> None:
    """A line, if the series was recorded: short ones with a dot an epoch, validation macro F1 starred at its best."""
    if history.get(key) is None or len(history[key]) == 0:
        return
    epochs, values = np.asarray(history["epoch"]), np.asarray(history[key], dtype=np.float64)  # None becomes NaN
    if epochs.shape != values.shape:
        raise ValueError(f"{model}: {key} has {len(values)} values for {len(epochs)} epochs; put None where one lacks")
    marker = "o" if len(epochs) <= 12 else ""
    axes.plot(epochs, values, linestyle=line_style, linewidth=1.8, marker=marker, markersize=4, color=colour)
    if key == "val_macro_f1" and np.isfinite(values).any():
        best = int(np.nanargmax(values))
        axes.plot(epochs[best], values[best], "*", color=colour, markersize=13, markeredgecolor="white", zorder=4)


def save_study_plots(plots: Mapping[str, Callable[[], Any]], *, folder: Path, name: str) -> list[Path]:
    """Draws a search with Optuna's own plots, as `optuna_<name>_<what>.png`.

    Args:
        plots: by what they show; see `search.study.study_plots`.
        folder: where the PNGs go.
        name: of the model, for titles and file names.
    """
    return [
        _save_optuna(draw, folder / f"optuna_{name}_{what}.png", title=f"{name}: {what.replace('_', ' ')}")
        for what, draw in plots.items()
    ]


@theme()
def _save_optuna(draw: Any, path: Path, *, title: str) -> Path:
    """Optuna draws with pyplot: its figure is fitted, saved and closed."""
    import warnings

    from matplotlib import pyplot

    pyplot.rcParams["figure.constrained_layout.use"] = True  # from the start: a colour bar is placed by it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its plots are marked experimental
        axes = np.ravel(draw())
    figure = axes[0].figure
    figure.set_size_inches(max(8.0, 3.2 * len(axes)), 4.8)
    for a in axes:
        a.set_title("")
        a.set_title("", loc="left")
        if a.get_ylabel() == "Objective Value":
            a.set_ylabel("validation macro F1")
        if a.get_xscale() == "log":  # its labels of 2, 3, 4, ... times a power of ten would cover each other
            low, high = a.get_xlim()
            a.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 100 else (1.0,), numticks=4))
            a.xaxis.set_major_formatter("{x:.0e}")
            a.xaxis.set_minor_formatter(NullFormatter())
        elif a.get_xlabel() == "Trial":
            a.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif a.get_xlabel() == "Hyperparameter Importance" and a.get_legend():
            a.get_legend().remove()  # it names one colour only, and covers the last label
    figure.suptitle(title)
    try:
        return save(figure, path)
    finally:
        pyplot.close(figure)

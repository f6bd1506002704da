"""The pictures of a comparison and of an ablation."""

from __future__ import annotations

import functools
import itertools
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from waferlab.reports.style import GRID, INK, MUTED, model_colours, new_figure, save, style, wrap_name
from waferlab.reports.tables import CONTEXTS, Record, by_score, effect_bars, tested_only, what_bars_join


def plot_seed_comparison(record: Record, *, path: str | os.PathLike[str]) -> Path:
    """Draws the test macro F1 of every model: each seed a dot, their mean and its interval (PNG).

    Args:
        record: of a comparison: `models`, `runs`, `seeds`, `interval_method`.
        path: the PNG to write.

    Raises:
        ValueError: the record has no model.
    """
    models, colours = by_score(record), _colour_of(record)
    figure = new_figure(10, 2.5 + 0.75 * len(models), "Macro F1 of each model and seed")
    axes = figure.subplots()
    for row, model in enumerate(models):
        runs = [run for run in record["runs"] if run["model_type"] == model["model_type"]]
        _draw_row(axes, row, model, [run["macro_f1"] for run in runs], colour=colours[model["model_type"]])
    bars = f"bar: {record['interval_method']}" if any(m["interval"] for m in models) else "no interval: one seed"
    _finish_rows(axes, [model["model_type"] for model in models], "Macro F1 on the test part")
    _write_below(figure, f"dot: one seed; diamond: mean; {bars}")
    return save(figure, path)


def plot_critical_difference(record: Record, *, path: str | os.PathLike[str]) -> Path:
    """Draws models on the macro F1 axis by their mean; bars join those not shown to differ (PNG).

    In the style of Demšar 2006, "Statistical comparisons of classifiers over multiple data sets" (JMLR 7), with the
    means themselves instead of ranks and with pairwise tests, so that a bar is a largest group of models of which no
    pair differs significantly after correction. A bar has a dot at each of its members: it may pass over a model that
    is none.

    Args:
        record: of a comparison: `models`, `differences`, `difference_method`.
        path: the PNG to write.

    Raises:
        ValueError: the record has no model.
    """
    models, colours = by_score(record)[::-1], _colour_of(record)
    means = {model["model_type"]: model["mean"] for model in models}
    groups = _not_told_apart(list(means), record["differences"])
    n_left = len(models) // 2
    top = 1.0 + 0.55 * len(groups)  # where the labels begin, in rows
    depth = top + max(n_left, len(models) - n_left)
    figure = new_figure(11, 1.9 + 0.42 * depth, "Which models differ")
    axes = figure.subplots()
    margin = max(0.01, 0.12 * (max(means.values()) - min(means.values())))
    axes.set(xlim=(min(means.values()) - margin, max(means.values()) + margin), ylim=(depth, 0), yticks=[])
    for position, (name, mean) in enumerate(means.items()):
        left = position < n_left
        row = top + (position if left else len(models) - 1 - position)
        side = axes.get_xlim()[0 if left else 1]
        axes.plot([mean, mean, side], [0, row, row], color=colours[name], linewidth=1.6)
        axes.plot(mean, 0, "o", color=colours[name], markersize=8, clip_on=False, zorder=4)
        place = {"xytext": (-6 if left else 6, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
        axes.annotate(f"{wrap_name(name, 34)}  {mean:.3f}", (side, row), va="center", fontsize=11, color=INK, **place)
    for level, group in enumerate(groups):
        members = [means[name] for name in group]
        style_of_bar = {"color": INK, "linewidth": 5, "solid_capstyle": "round", "zorder": 3}
        axes.plot([min(members), max(members)], [0.75 + 0.55 * level] * 2, **style_of_bar)
        axes.plot(members, [0.75 + 0.55 * level] * len(members), "o", color="white", markersize=3, zorder=5)
    style(axes, "Mean macro F1 on the test part", grid="x")
    _write_below(figure, what_bars_join(record))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.spines["left"].set_visible(False)
    axes.spines["top"].set_visible(True)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    return save(figure, path)


def _not_told_apart(names: Sequence[str], differences: Sequence[Record]) -> list[list[str]]:
    """The largest groups of two or more of which no pair differs significantly (Bron & Kerbosch 1973, CACM 16)."""
    alike: dict[str, set[str]] = {name: set() for name in names}
    for difference in tested_only(differences):
        if not difference["significant"]:
            alike[difference["a"]].add(difference["b"])
            alike[difference["b"]].add(difference["a"])

    def grow(group: list[str], candidates: set[str], seen: set[str]) -> Iterator[list[str]]:
        if not candidates and not seen and len(group) > 1:
            yield group
        for name in [name for name in names if name in candidates]:
            yield from grow([*group, name], candidates & alike[name], seen & alike[name])
            candidates, seen = candidates - {name}, seen | {name}

    return list(grow([], set(names), set()))


def plot_trade_offs(record: Record, *, path: str | os.PathLike[str]) -> Path:
    """Draws macro F1 against training time, parameters and latency; a line joins the models that none beats (PNG).

    A model is beaten if another scores higher and costs no more. What was not measured is left out of its panel.

    Args:
        record: of a comparison: `models`, `interval_method`.
        path: the PNG to write.

    Raises:
        ValueError: the record has no model.
    """
    models, colours = by_score(record), _colour_of(record)
    figure = new_figure(14, 5.6, "What macro F1 costs")
    panels = figure.subplots(1, 3, sharey=True)
    costs = (
        ("train_seconds", "Training time (s)"),
        ("n_parameters", "Parameters"),
        ("latency_ms", "Latency (ms per map)"),
    )
    for axes, (key, label) in zip(panels, costs, strict=True):
        known = [model for model in models if model[key]]
        _draw_trade_off(axes, known, key, label, [colours[model["model_type"]] for model in known])
    panels[0].set_ylabel("Macro F1 on the test part", color=INK, fontsize=11)
    ends = [end for model in models for end in (model["mean"], *(model["interval"] or ()))]
    margin = max(0.03, 0.15 * (max(ends) - min(ends)))
    panels[0].set_ylim(max(-0.02, min(ends) - margin), min(1.04, max(ends) + margin))
    bars = f"bars: {record['interval_method']}" if any(m["interval"] for m in models) else "no intervals: one seed"
    note = f"Up and to the left is better. Dashed: the models that no other beats in both; {bars}"
    _write_below(figure, note)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # places the panels; the labels are then laid where they hide nothing
    figure.set_layout_engine("none")
    for axes in panels:
        _label_points(axes, renderer)
    return save(figure, path)


def _draw_trade_off(axes: Axes, models: Sequence[Record], key: str, label: str, colours: Sequence[str]) -> None:
    beaten = [any(o[key] <= m[key] and o["mean"] > m["mean"] for o in models) for m in models]
    front = sorted((m for m, is_beaten in zip(models, beaten, strict=True) if not is_beaten), key=lambda m: m[key])
    axes.plot([m[key] for m in front], [m["mean"] for m in front], "--", color=MUTED, linewidth=1.2, zorder=1)
    for model, colour in zip(models, colours, strict=True):
        x, mean, interval = model[key], model["mean"], model["interval"]
        if interval is not None:
            axes.plot([x, x], interval, "-_", color=colour, linewidth=2, markersize=9, markeredgewidth=2)
        # The label of a line that starts without an underscore is a model's name: _label_points writes it beside.
        axes.plot(x, mean, "o", color=colour, markersize=10, label=wrap_name(model["model_type"], 22))
    style(axes, label, grid="both")
    values = [model[key] for model in models]
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.set_xticks([])
    elif max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2.5, max(values) * 2.5)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.3 * max(values))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))
    if values:
        axes.xaxis.set_major_formatter(lambda value, _: _short_number(value))


def _short_number(value: float) -> str:
    """1,500,000 as 1.5M, for ticks."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def _label_points(axes: Axes, renderer: RendererAgg) -> None:
    """Writes each dot's label where it overlaps no dot, line or other label, as near to its dot as possible."""
    dots = [line for line in axes.lines if not line.get_label().startswith("_")]
    taken = [line.get_window_extent(renderer).padded(2).extents for line in axes.lines if line.get_linestyle() != "--"]
    front = next(line for line in axes.lines if line.get_linestyle() == "--").get_xydata()
    for start, end in itertools.pairwise(axes.transData.transform(front)):  # a slanting line is a row of small boxes
        taken += [np.concatenate([point - 2, point + 2]) for point in np.linspace(start, end, 60)]
    panel = axes.get_window_extent(renderer).extents
    for dot in dots:
        x, y = dot.get_xdata()[0], dot.get_ydata()[0]
        text = axes.annotate(
            dot.get_label(), (x, y), xytext=(0, 0), textcoords="offset points", fontsize=9.5, color=INK,
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": GRID, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        text.set_in_layout(False)
        hidden = functools.partial(_overlap, text, taken=np.array(taken), panel=panel, renderer=renderer)
        _place(text, min(_places_around(), key=hidden))
        taken.append(_text_box(text, renderer).extents)


def _places_around() -> Iterator[tuple[float, float, str, str]]:
    """Offsets in points with their alignment, the nearest first."""
    sides = {(1, 0): ("left", "center"), (-1, 0): ("right", "center"), (0, 1): ("center", "bottom")}
    sides |= {(0, -1): ("center", "top"), (1, 1): ("left", "bottom"), (1, -1): ("left", "top")}
    sides |= {(-1, 1): ("right", "bottom"), (-1, -1): ("right", "top")}
    for distance in (9, 16, 26, 40, 58, 80, 110, 150):
        for (across, up), (horizontal, vertical) in sides.items():
            yield distance * across, distance * up, horizontal, vertical


def _place(text: Annotation, place: tuple[float, float, str, str]) -> None:
    text.set_position(place[:2])
    text.set(horizontalalignment=place[2], verticalalignment=place[3])


def _text_box(text: Annotation, renderer: RendererAgg) -> Bbox:
    """Of the words alone, without the line that leads to the dot, in pixels."""
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _overlap(
    text: Annotation,
    place: tuple[float, float, str, str],
    *,
    taken: np.ndarray,
    panel: np.ndarray,
    renderer: RendererAgg,
) -> float:
    """Square pixels that the text would cover at this place of boxes [N, 4], and those it would have off its panel."""
    _place(text, place)
    box = _text_box(text, renderer).extents
    others = np.vstack([panel, taken])
    shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    inside, *covered = shared.clip(min=0).prod(axis=1)
    return float(np.prod(box[2:] - box[:2]) - inside + sum(covered))


def plot_ablation(record: Record, *, path: str | os.PathLike[str]) -> Path:
    """Draws what each component brings, alone and left out, and the scores of all variants beside it (PNG).

    Args:
        record: of an ablation: `model_type`, `components`, `effects`, `variants`, `interval_method`,
            `difference_method`.
        path: the PNG to write.

    Raises:
        ValueError: the record has no variant.
    """
    variants, components = record["variants"], record["components"]
    if not variants:
        raise ValueError("the record has no variant: an ablation needs the baseline at least")
    height = 2.9 + 0.55 * max(len(variants), 1.4 * len(components))
    figure = new_figure(14.5, height, f"What each component brings to {record['model_type']}")
    effects, scores = figure.subplots(1, 2, width_ratios=[1.15, 1])
    for effect in record["effects"]:
        _draw_effect(effects, components.index(effect["component"]), effect)
    effects.axvline(0, color=INK, linewidth=1.2, zorder=1)
    low, high = effects.dataLim.intervalx  # zero is in it, by its line
    width = max(high - low, 0.02)
    effects.set_xlim(low - 0.06 * width, high + 0.16 * width)  # room for the number beside the longest bar
    _finish_rows(
        effects, components, f"Difference in macro F1, with minus without\n{_wrap(f'bars: {effect_bars(record)}', 65)}"
    )
    for row, variant in enumerate(variants):
        _draw_row(scores, row, variant, variant["scores"], colour=_variant_colour(variant["name"]))
    baseline = next((v["mean"] for v in variants if v["name"] == "baseline"), None)
    if baseline is not None:
        scores.axvline(baseline, color=MUTED, linewidth=1.2, linestyle=":", zorder=1)
    names = [variant["name"] for variant in variants]
    _finish_rows(scores, names, f"Macro F1 on the test part\n{_wrap(_score_bars(variants, record), 55)}")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=9, label=words)
        for marker, colour, words in CONTEXTS.values()
    ]
    hollow = {"color": MUTED, "markerfacecolor": "white", "marker": "o", "linestyle": "none", "markersize": 9}
    handles += [Line2D([], [], label="hollow: no effect shown", **hollow)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return save(figure, path)


def _score_bars(variants: Sequence[Record], record: Record) -> str:
    dots = "dot: one seed; diamond: mean; dotted: baseline"
    return (
        f"{dots}; bar: {record['interval_method']}" if any(v["interval"] for v in variants) else f"{dots}; no intervals"
    )


def _variant_colour(name: str) -> str:
    """That of the effect which the variant is measured for."""
    if name.startswith("baseline +"):
        return CONTEXTS["alone"][1]
    return CONTEXTS["left out"][1] if name.startswith("everything but") else INK


def _draw_effect(axes: Axes, row: int, effect: Record) -> None:
    marker, colour, _ = CONTEXTS[effect["context"]]
    y = row + (-0.17 if effect["context"] == "alone" else 0.17)
    if effect["interval"] is not None:
        axes.plot(effect["interval"], [y, y], "-|", color=colour, linewidth=2.2, markersize=9, markeredgewidth=2.2)
    face = "white" if effect["verdict"] == "no effect shown" else colour
    axes.plot(effect["difference"], y, marker, color=colour, markerfacecolor=face, markersize=8.5, markeredgewidth=1.8)
    end = max(effect["difference"], *(effect["interval"] or ()), effect["difference"])
    beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
    beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the zero line may pass behind it
    axes.annotate(f"{effect['difference']:+.3f}".replace("-", "−"), (end, y), fontsize=10, color=INK, **beside)


def _draw_row(axes: Axes, row: int, scored: Record, scores: Sequence[float], *, colour: str) -> None:
    """A row's seeds as pale dots, below them their mean as a diamond with its interval and its number."""
    axes.plot(scores, [row + 0.16] * len(scores), "o", color=colour, alpha=0.5, markersize=6, markeredgewidth=0)
    if scored["interval"] is not None:
        axes.plot(scored["interval"], [row, row], "-|", color=colour, linewidth=2.5, markersize=11, markeredgewidth=2.5)
    axes.plot(scored["mean"], row, "D", color=colour, markersize=8, markeredgecolor="white")
    above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
    axes.annotate(f"{scored['mean']:.3f}", (scored["mean"], row), fontsize=10, color=INK, **above)


def _finish_rows(axes: Axes, names: Sequence[str], label: str) -> None:
    """Names the rows, the first on top."""
    axes.set_yticks(range(len(names)), [wrap_name(name, 30) for name in names])
    style(axes, label, grid="x")
    axes.tick_params(axis="y", labelsize=11)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 4, 5, 10]))


def _colour_of(record: Record) -> dict[str, str]:
    """By the record's order, so that a model has one colour in all pictures."""
    names = [model["model_type"] for model in record["models"]]
    return dict(zip(names, model_colours(len(names)), strict=True))


def _write_below(figure: Figure, note: str) -> None:
    """What dots and bars are, under the whole picture."""
    figure.supxlabel(_wrap(note, int(12 * figure.get_figwidth())), fontsize=10, color=MUTED)


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))

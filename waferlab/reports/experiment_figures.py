"""The pictures of a comparison and of an ablation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from waferlab.reports.style import (
    INK,
    MUTED,
    PALETTE,
    draw_estimate,
    legend_below,
    model_colours,
    new_figure,
    save,
    say_so,
    style,
    theme,
    wrap,
    wrap_name,
)
from waferlab.reports.tables import CONTEXTS, Record, about, by_score, effect_bars, score_bars, tested, what_bars_join

TEST_SCORE = "Macro F1 on the test part"
SIGNS = {"alone": ("o", PALETTE[0]), "left out": ("s", PALETTE[1])}  # how a component is tried: marker and colour
COSTS = {"train_seconds": "Training time (s)", "n_parameters": "Parameters", "latency_ms": "Latency (ms per map)"}


@theme()
def plot_seed_comparison(record: Record, *, path: str | os.PathLike[str]) -> Path:
    """Draws the test macro F1 of every model: each seed a dot, their mean and its interval (PNG).

    Args:
        record: of a comparison: `models`, `runs`, `seeds`, `interval_method`.
        path: the PNG to write.

    Raises:
        ValueError: the record has no model.
    """
    models, colours = by_score(record), _colours(record)
    scores = {model["model_type"]: [] for model in models}
    for run in record["runs"]:
        scores[run["model_type"]].append(run["macro_f1"])
    figure = new_figure(10, 2.5 + 0.75 * len(models), "Macro F1 of each model and seed")
    axes = figure.subplots()
    _draw_rows(axes, scores, models, [colours[name] for name in scores])
    style(axes, TEST_SCORE, grid="x")
    _write_below(figure, f"dot: one seed; diamond: mean; bar: {score_bars(models, record)}")
    return save(figure, path)


def _draw_rows(axes: Axes, scores: dict[str, list[float]], means: Sequence[Record], colours: Sequence[str]) -> None:
    """Rows by name, the first on top: the seeds as pale dots, above them their mean as a diamond with its interval."""
    import seaborn

    names = [wrap_name(name, 30) for name in scores]
    seeds = [(score, name) for name, row in zip(names, scores.values(), strict=True) for score in row]
    of_seed = dict(zip(("x", "y"), zip(*seeds, strict=True), strict=True))
    how = {"size": 7, "alpha": 0.5, "jitter": False, "legend": False}
    seaborn.stripplot(**of_seed, order=names, hue=of_seed["y"], hue_order=names, palette=list(colours), ax=axes, **how)
    for row, (mean, colour) in enumerate(zip(means, colours, strict=True)):
        draw_estimate(axes, row - 0.16, mean["mean"], mean["interval"], colour=colour, marker="D")
    _finish_rows(axes, len(names))


@theme()
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
    means = {model["model_type"]: model["mean"] for model in by_score(record)[::-1]}
    groups = not_told_apart(list(means), record["differences"])
    top = 1.0 + 0.55 * len(groups)  # where the labels begin, in rows
    depth = top + (len(means) + 1) // 2
    figure = new_figure(11, 1.9 + 0.42 * depth, "Which models differ")
    axes = figure.subplots()
    margin = max(0.01, 0.12 * (max(means.values()) - min(means.values())))
    axes.set(xlim=(min(means.values()) - margin, max(means.values()) + margin), ylim=(depth, 0), yticks=[])
    _draw_leads(axes, means, _colours(record), top=top)
    for level, group in enumerate(groups):
        members, row = [means[name] for name in group], 0.75 + 0.55 * level
        axes.plot(members, [row] * len(members), color=INK, linewidth=5, solid_capstyle="round", zorder=3)
        axes.plot(members, [row] * len(members), "o", color="white", markersize=3, zorder=5)
    style(axes, "Mean macro F1 on the test part", grid="x")
    _write_below(figure, what_bars_join(record))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.spines["top"].set_visible(True)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    return save(figure, path)


def _draw_leads(axes: Axes, means: dict[str, float], colours: dict[str, str], *, top: float) -> None:
    """A line from each model's mean to its name, the lower half of the models to the left, the others to the right."""
    for position, (name, mean) in enumerate(means.items()):
        left = position < len(means) // 2
        row = top + (position if left else len(means) - 1 - position)
        side = axes.get_xlim()[0 if left else 1]
        axes.plot([mean, mean, side], [0, row, row], color=colours[name], linewidth=1.6)
        axes.plot(mean, 0, "o", color=colours[name], markersize=8, clip_on=False, zorder=4)
        beside = {"xytext": (-6 if left else 6, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
        axes.annotate(f"{wrap_name(name, 34)}  {mean:.3f}", (side, row), va="center", fontsize=11, **beside)


def not_told_apart(names: Sequence[str], differences: Sequence[Record]) -> list[list[str]]:
    """The largest groups of two or more of which no pair was found to differ, in the order of the names."""
    import networkx

    alike = networkx.Graph((d["a"], d["b"]) for d in tested(differences) if not d["significant"])
    groups = [sorted(names.index(name) for name in group) for group in networkx.find_cliques(alike)]
    return [[names[index] for index in group] for group in sorted(groups)]


@theme()
def plot_trade_offs(record: Record, *, path: str | os.PathLike[str]) -> Path:
    """Draws macro F1 against training time, parameters and latency; a line joins the models that none beats (PNG).

    A model is beaten if another scores higher and costs no more. What was not measured is left out of its panel.

    Args:
        record: of a comparison: `models`, `interval_method`.
        path: the PNG to write.

    Raises:
        ValueError: the record has no model.
    """
    models, colours = by_score(record), _colours(record)
    figure = new_figure(14, 6, "What macro F1 costs")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (key, label) in zip(panels, COSTS.items(), strict=True):
        _draw_trade_off(axes, [model for model in models if model[key]], key, colours)
        style(axes, label, grid="both")
    panels[0].set_ylabel(TEST_SCORE)
    note = (
        f"Up and to the left is better. Dashed: no other model beats these in both; bars: {score_bars(models, record)}"
    )
    legend_below(figure, {model["model_type"]: colours[model["model_type"]] for model in models}, note=wrap(note, 160))
    return save(figure, path)


def _draw_trade_off(axes: Axes, models: Sequence[Record], key: str, colours: dict[str, str]) -> None:
    front = [m for m in models if not any(o[key] <= m[key] and o["mean"] > m["mean"] for o in models)]
    front.sort(key=lambda model: model[key])
    axes.plot([m[key] for m in front], [m["mean"] for m in front], "--", color=MUTED, linewidth=1.2, zorder=1)
    for model in models:
        x, colour = model[key], colours[model["model_type"]]
        if model["interval"] is not None:
            axes.plot([x, x], model["interval"], "-_", color=colour, linewidth=2, markersize=9, markeredgewidth=2)
        axes.plot(x, model["mean"], "o", color=colour, markersize=10)
    costs = [model[key] for model in models]
    if not costs:
        say_so(axes, "not measured")
        return
    if max(costs) > 10 * min(costs):
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 2.5, max(costs) * 2.5)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.3 * max(costs))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if key == "n_parameters" else "{x:g}")


@theme()
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
    _draw_effects(effects, record["effects"], components)
    style(effects, f"Difference in macro F1, with minus without\n{wrap(f'bars: {effect_bars(record)}', 65)}", grid="x")
    colours = [SIGNS[found[1]][1] if (found := about(variant)) else INK for variant in variants]
    _draw_rows(scores, {variant["name"]: variant["scores"] for variant in variants}, variants, colours)
    for variant in variants:
        if not any(variant["components"].values()):
            scores.axvline(variant["mean"], color=MUTED, linewidth=1.2, linestyle=":", zorder=1)
    what = f"dot: one seed; diamond: mean; dotted: baseline; bar: {score_bars(variants, record)}"
    style(scores, f"{TEST_SCORE}\n{wrap(what, 55)}", grid="x")
    signs = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=9, label=f"{how}: {CONTEXTS[how]}")
        for how, (marker, colour) in SIGNS.items()
    ]
    hollow = {"color": MUTED, "markerfacecolor": "white", "marker": "o", "linestyle": "none", "markersize": 9}
    legend_below(figure, {}, *signs, Line2D([], [], label="hollow: no effect shown", **hollow))
    return save(figure, path)


def _draw_effects(axes: Axes, effects: Sequence[Record], components: Sequence[str]) -> None:
    """Two rows for each component: alone above, left out below; hollow where no effect was shown."""
    axes.axvline(0, color=INK, linewidth=1.2, zorder=1)
    for effect in effects:
        marker, colour = SIGNS[effect["context"]]
        row = components.index(effect["component"]) + (-0.15 if effect["context"] == "alone" else 0.25)
        how = {"colour": colour, "marker": marker, "form": "{:+.3f}"}
        how["face"] = "white" if effect["verdict"] == "no effect shown" else None
        draw_estimate(axes, row, effect["difference"], effect["interval"], **how)
    axes.set_yticks(range(len(components)), [wrap_name(name, 30) for name in components])
    _finish_rows(axes, len(components))


def _finish_rows(axes: Axes, number: int) -> None:
    axes.set(ylabel="", ylim=(number - 0.4, -0.6))
    axes.tick_params(axis="y", labelsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 4, 5, 10]))


def _colours(record: Record) -> dict[str, str]:
    """By the record's order, so that a model has one colour in all pictures."""
    names = [model["model_type"] for model in record["models"]]
    return dict(zip(names, model_colours(len(names)), strict=True))


def _write_below(figure: Figure, note: str) -> None:
    """What dots and bars are, under the whole picture."""
    figure.supxlabel(wrap(note, int(12 * figure.get_figwidth())), fontsize=10, color=MUTED)

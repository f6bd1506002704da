"""Records in; pictures, tables and pages out.

A record is a plain dict, as it is read from JSON: of `run_experiment.py --mode comparison` or `ablation`, or the
summary of a pipeline (`experiment_summary.json`). Nothing here trains, loads data or computes a score; what a page says
is in the record.

    plot_seed_comparison(record, path=folder / "seed_comparison.png")
    write_report(record, folder=folder, pictures=["seed_comparison.png"], path=folder / "report.html")
    write_model_card(summary, folder=folder)

A page is first put together as `Page`: sections of paragraphs, lists, tables, pictures and code. One template turns any
of them into HTML, one function into Markdown, so that both say the same. The HTML needs nothing but itself: styles are
inside, pictures are inside as base64, there is no script, and a content security policy forbids every request.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import itertools
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from evaluation import (
    GRID,
    INK,
    MUTED,
    PALETTE,
    format_number,
    model_colours,
    new_figure,
    save,
    style,
    wrap_name,
    write_atomically,
)

Record = Mapping[str, Any]

TEMPLATES = Path(__file__).resolve().parent / "templates"
FEW_MAPS = 30  # a class with fewer in the test part: one map more or less moves its recall by over 3 points
CONTEXTS = {  # how a component is tried: marker, colour, and what the difference is
    "alone": ("o", PALETTE[0], "alone: added to the baseline"),
    "left out": ("s", PALETTE[1], "left out: everything against everything but it"),
}


# Pictures


def plot_seed_comparison(record: Record, *, path: str | os.PathLike[str]) -> Path:
    """Draws the test macro F1 of every model: each seed a dot, their mean and its interval (PNG).

    Args:
        record: of a comparison: `models`, `runs`, `seeds`, `interval_method`.
        path: the PNG to write.

    Raises:
        ValueError: the record has no model.
    """
    models, colours = _by_score(record), _colour_of(record)
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
    models, colours = _by_score(record)[::-1], _colour_of(record)
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
    _write_below(figure, _what_bars_join(record))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.spines["left"].set_visible(False)
    axes.spines["top"].set_visible(True)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    return save(figure, path)


def _what_bars_join(record: Record) -> str:
    if not _tested(record["differences"]):
        return "no pair was tested, so there are no bars: that takes two models and more than one seed"
    return f"bars join models that are not shown to differ: {record['difference_method']}"


def _tested(differences: Sequence[Record]) -> list[Record]:
    return [difference for difference in differences if difference["p"] is not None]


def _not_told_apart(names: Sequence[str], differences: Sequence[Record]) -> list[list[str]]:
    """The largest groups of two or more of which no pair differs significantly (Bron & Kerbosch 1973, CACM 16)."""
    alike: dict[str, set[str]] = {name: set() for name in names}
    for difference in _tested(differences):
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
    models, colours = _by_score(record), _colour_of(record)
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
        effects, components, f"Difference in macro F1, with minus without\n{_wrap(f'bars: {_effect_bars(record)}', 65)}"
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


def _effect_bars(record: Record) -> str:
    if not record["effects"]:
        return "none, no component was measured both with and without"
    if not any(effect["interval"] for effect in record["effects"]):
        return "none, since it takes several seeds"
    return record["difference_method"]


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


def _by_score(record: Record) -> list[Record]:
    """The models, highest mean first."""
    if not record["models"]:
        raise ValueError("the record has no model: a comparison needs at least one that was trained")
    return sorted(record["models"], key=lambda model: -model["mean"])


def _colour_of(record: Record) -> dict[str, str]:
    """By the record's order, so that a model has one colour in all pictures."""
    names = [model["model_type"] for model in record["models"]]
    return dict(zip(names, model_colours(len(names)), strict=True))


def _write_below(figure: Figure, note: str) -> None:
    """What dots and bars are, under the whole picture."""
    figure.supxlabel(_wrap(note, int(12 * figure.get_figwidth())), fontsize=10, color=MUTED)


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


# What a page is made of


@dataclasses.dataclass(frozen=True)
class Items:
    """A list with bullets."""

    entries: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; columns of numbers are set flush right, the row `best` bold, `note` stands below."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None
    note: str = ""

    def is_number(self, column: int) -> bool:
        """Whether each cell of a column (but for dashes) begins with a number."""
        cells = [row[column] for row in self.rows if row[column] != "-"]
        return all(re.match(r"[<+-]?\d[\d,.%]*($|[ /±→])", cell) for cell in cells)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    path: Path
    caption: str

    def base64(self) -> str:
        """The file's content, for a `data:` address."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines to type."""

    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands below it; folded, it opens with a click."""

    heading: str
    blocks: Sequence[str | Items | Table | Picture | Code]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """Title, the verdict as lead, a line of facts, sections."""

    title: str
    lead: str
    facts: Sequence[str]
    sections: Sequence[Section]

    def to_html(self) -> str:
        """One page that needs nothing else; all text is escaped by the template engine."""
        template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
        return template.get_template("page.html").render(page=self)

    def to_markdown(self) -> str:
        """The same in GitHub's Markdown, pictures by their file names."""
        parts = [f"# {_plain(self.title)}", _plain(self.lead), _plain(" · ".join(self.facts))]
        for section in self.sections:
            parts += [f"## {_plain(section.heading)}", *map(_block_markdown, section.blocks)]
        return "\n\n".join(part for part in parts if part) + "\n"


def _block_markdown(block: str | Items | Table | Picture | Code) -> str:
    match block:
        case Items():
            return "\n".join(f"- {_plain(entry)}" for entry in block.entries)
        case Table():
            return _table_markdown(block)
        case Picture():
            return f"![{_plain(block.caption)}]({block.path.name})"
        case Code():
            return textwrap.indent(block.text, "    ")  # by indentation, since a text may hold a fence
    return _plain(block)


def _table_markdown(table: Table) -> str:
    sides = ["---:" if table.is_number(column) else "---" for column in range(len(table.headings))]
    rows = [[_plain(cell) for cell in row] for row in table.rows]
    if table.best is not None:
        rows[table.best] = [f"**{cell}**" for cell in rows[table.best]]
    lines = [map(_plain, table.headings), sides, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (f"\n\n{_plain(table.note)}" if table.note else "")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tag, no link or picture, no further column."""
    escaped = html.escape(text, quote=False).replace("](", "]\\(").replace("|", "\\|")
    return " ".join(escaped.split("\n"))


# Figures as text


def _with_interval(value: float | None, interval: Sequence[float] | None, form: str = "{:.3f}") -> str:
    bounds = "" if interval is None else f" [{', '.join(form.format(end) for end in interval)}]"
    return format_number(value, form) + bounds


def _p_value(p: float | None) -> str:
    return "<0.001" if p is not None and p < 0.001 else format_number(p, "{:.3f}")


def _value(value: Any) -> str:
    """A value of the configuration or environment."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)  # a path is not in JSON's types


def _values(mapping: Record, *, headings: tuple[str, str] = ("Name", "Value")) -> Table:
    return Table(headings, [(key, _value(value)) for key, value in mapping.items()])


def _costs(row: Record) -> list[str]:
    """Parameters, seconds of training and latency of a model or run."""
    forms = {"n_parameters": "{:,.0f}", "train_seconds": "{:,.1f}", "latency_ms": "{:,.2f}"}
    return [format_number(row.get(key), form) for key, form in forms.items()]


def _best(rows: Sequence[Record], key: Callable[[Record], float]) -> int | None:
    """The row to set bold; with one row there is nothing to choose."""
    return max(range(len(rows)), key=lambda index: key(rows[index])) if len(rows) > 1 else None


# Comparison and ablation


def comparison_markdown(record: Record) -> str:
    """The models of a comparison as a Markdown table, and below it their paired differences, if any were tested."""
    tables = [_models_table(record), *([_differences_table(record)] if record["differences"] else [])]
    return "\n\n".join(map(_table_markdown, tables))


def ablation_markdown(record: Record) -> str:
    """The variants of an ablation as a Markdown table, with the verdict on the component that each is about."""
    return _table_markdown(_variants_table(record))


def _models_table(record: Record) -> Table:
    models = _by_score(record)
    rows = [
        [
            model["model_type"],
            _with_interval(model["mean"], model["interval"]),
            format_number(model["std"], "{:.3f}"),
            str(model["n"]),
            format_number(model["accuracy_mean"], "{:.3f}"),
            *_costs(model),
            format_number(model["epochs"], "{:.1f}"),
        ]
        for model in models
    ]
    headings = (
        "Model",
        "Macro F1 (mean)",
        "SD",
        "Seeds",
        "Accuracy",
        "Parameters",
        "Training (s)",
        "Latency (ms)",
        "Epochs",
    )
    one = "no interval: it takes more than one seed"
    brackets = f"in brackets: {record['interval_method']}" if any(model["interval"] for model in models) else one
    note = f"All scores are of the test part, means over seeds; SD: standard deviation over seeds; {brackets}."
    return Table(headings, rows, best=0 if len(rows) > 1 else None, note=note)


def _differences_table(record: Record) -> Table:
    rows = [
        [
            f"{difference['a']} against {difference['b']}",
            _with_interval(difference["difference"], difference["interval"], "{:+.3f}"),
            _p_value(difference["p"]),
            _p_value(difference["p_corrected"]),
            _who_is_better(difference),
        ]
        for difference in record["differences"]
    ]
    note = f"Difference in macro F1, first minus second: {record['difference_method']}."
    return Table(("Models", "Difference", "p", "p, corrected", "Verdict"), rows, note=note)


def _who_is_better(difference: Record) -> str:
    if difference["p"] is None:
        return "not tested"
    if not difference["significant"]:
        return "no difference shown"
    return f"{difference['a' if difference['difference'] > 0 else 'b']} is better"


def _runs_table(record: Record) -> Table:
    rows = [
        [
            run["model_type"],
            str(run["seed"]),
            _with_interval(run["macro_f1"], run["macro_f1_interval"]),
            format_number(run["accuracy"], "{:.3f}"),
            format_number(run["validation_macro_f1"], "{:.3f}"),
            *_costs(run),
            str(run["epochs"]),
            run["weights"],
        ]
        for run in record["runs"]
    ]
    headings = ("Model", "Seed", "Macro F1", "Accuracy", "Macro F1, validation")
    headings += ("Parameters", "Training (s)", "Latency (ms)", "Epochs", "Started from")
    return Table(headings, rows, note="In brackets: 95% interval over the lots of that run's test part.")


def _variants_table(record: Record) -> Table:
    baseline = next((variant for variant in record["variants"] if variant["name"] == "baseline"), None)
    effects = {(effect["component"], effect["context"]): effect for effect in record["effects"]}
    rows = []
    for variant in record["variants"]:
        about = re.fullmatch(r"(baseline \+|everything but) (.*)", variant["name"])
        context = {"baseline +": "alone", "everything but": "left out"}[about[1]] if about else None
        effect = effects.get((about[2], context)) if about else None
        rows.append(
            [
                variant["name"],
                _with_interval(variant["mean"], variant["interval"]),
                _gain(variant, baseline),
                _effect_in_words(effect) if effect else "-",
            ]
        )
    best = _best(record["variants"], lambda variant: variant["mean"])
    bars = f"in brackets: {record['interval_method']}" if any(v["interval"] for v in record["variants"]) else "one seed"
    note = f"Mean macro F1 of the test part over seeds, {bars}. Verdicts: with the component minus without it."
    if any(effect["p_corrected"] is not None for effect in record["effects"]):
        note += (
            f" Shown: p below 0.05 after correction for {len(record['effects']) + 1} comparisons (Holm 1979); the "
            "intervals in the verdicts are corrected likewise, those of the means are not."
        )
    return Table(("Configuration", "Macro F1 (mean)", "Difference to baseline", "Verdict"), rows, best=best, note=note)


def _gain(variant: Record, baseline: Record | None) -> str:
    """Over the baseline, also as a share of it."""
    if baseline is None or variant is baseline:
        return "-"
    gain = variant["mean"] - baseline["mean"]
    return f"{gain:+.3f}" + (f" ({gain / baseline['mean']:+.1%})" if baseline["mean"] else "")


def _effect_in_words(effect: Record) -> str:
    shown, name = effect["verdict"] != "no effect shown", effect["component"]
    verdict = f"{name} {effect['verdict']}" if shown else f"no effect of {name} shown"
    corrected = "" if effect["p_corrected"] is None else f", p {_p_value(effect['p_corrected'])}"
    return f"{verdict}: {_with_interval(effect['difference'], effect['interval'], '{:+.3f}')}{corrected}"


def _effects_table(record: Record) -> Table:
    rows = [
        [
            effect["component"],
            effect["context"],
            _with_interval(effect["difference"], effect["interval"], "{:+.3f}"),
            _p_value(effect["p"]),
            _p_value(effect["p_corrected"]),
            effect["verdict"],
        ]
        for effect in record["effects"]
    ]
    contexts = "; ".join(words for _, _, words in CONTEXTS.values())
    note = f"Difference in macro F1, with the component minus without it: {record['difference_method']}. {contexts}."
    return Table(("Component", "Context", "Difference", "p", "p, corrected", "Verdict"), rows, note=note)


def _scores_table(record: Record) -> Table:
    rows = [
        [variant["name"], *map("{:.3f}".format, variant["scores"]), format_number(variant["std"], "{:.3f}")]
        for variant in record["variants"]
    ]
    return Table(("Configuration", *(f"Seed {seed}" for seed in record["seeds"]), "SD"), rows)


# Pipeline


def _pipeline_table(record: Record) -> Table:
    models = record["models"]
    rows = [
        [
            model["model_type"],
            _with_interval(model["test"]["macro_f1"], model["test"]["intervals"]["macro_f1"]),
            format_number(model["test"]["accuracy"], "{:.3f}"),
            format_number(model["validation"]["macro_f1"], "{:.3f}"),
            *_costs(model),
            f"{model['best_epoch']} of {model['epochs']}",
        ]
        for model in models
    ]
    headings = ("Model", "Macro F1, test", "Accuracy, test", "Macro F1, validation", "Parameters", "Training (s)")
    headings += ("Latency (ms)", "Best epoch")
    best = next(i for i, model in enumerate(models) if model["model_type"] == record["best_model"])
    test = models[best]["test"]
    note = f"Bold: {record['best_model_rule']}. In brackets: {test['interval_method']}.{_classes_left_out(test)}"
    return Table(headings, rows, best=best if len(rows) > 1 else None, note=note)


def _absent(test: Record) -> list[str]:
    """The classes of which there is no test map."""
    return [name for name, row in test["per_class"].items() if not row["support"]]


def _classes_left_out(test: Record) -> str:
    """A sentence, with a space before it, on classes that are in no average; nothing if all have maps."""
    absent = _absent(test)
    return f" No test map of {', '.join(absent)}: without a score, and in no average." if absent else ""


def _weights(models: Sequence[Record]) -> Items:
    """What each training started from, and which of the weights that it came by were kept."""
    return Items(
        [
            f"{model['model_type']}: first weights {model['weights']}; final weights from the "
            f"{model.get('weights_from', 'final training')}."
            for model in models
        ]
    )


def _classes_table(model: Record) -> Table:
    classes = model["test"]["per_class"]
    rows = [
        [name, *(_of_class(row, key) for key in ("f1", "precision", "recall")), f"{row['support']:,}"]
        for name, row in classes.items()
    ]
    note = f"In brackets: {model['test']['interval_method']}; none where fewer than two test lots hold the class."
    note += _classes_left_out(model["test"])
    return Table(("Class", "F1", "Precision", "Recall", "Test maps"), rows, note=note)


def _of_class(row: Record, key: str) -> str:
    """A score of a class, a dash if there is no map of it, which some records give as 0."""
    return _with_interval(row[key], row.get(f"{key}_interval")) if row["support"] else "-"


def _decision_table(models: Sequence[Record]) -> Table:
    rows = []
    for model in models:
        rule = model["decision"]
        pairs = [
            (rule.get(f"{what}_before"), rule.get(f"{what}_after"))
            for what in ("validation_macro_f1", "calibration_error")
        ]
        changes = [f"{format_number(a, '{:.3f}')} → {format_number(b, '{:.3f}')}" for a, b in pairs]
        numbers = [f"{rule['temperature']:.3f}", f"{rule['prior_strength']:.2f}"]
        rows.append([model["model_type"], str(rule["views"]), *numbers, *changes])
    headings = ("Model", "Views", "Temperature", "Prior strength", "Macro F1, validation", "Calibration error")
    note = "Views: symmetries of each map that are averaged. Arrows lead from the plain model to that with the rule."
    return Table(headings, rows, note=note)


def _offsets_table(models: Sequence[Record]) -> Table:
    """What the decision rule adds to each class's log probability."""
    names, rows = list(models[0]["test"]["per_class"]), []
    for model in models:
        rule = model["decision"]
        offsets = [o for label, o in enumerate(rule["offsets"]) if label not in rule.get("left_out", ())]
        offsets = offsets or [0.0] * len(names)  # a rule that leans to no class lists none
        rows.append([model["model_type"], *map("{:+.3f}".format, offsets)])
    return Table(("Offset", *names), rows)


def _search_table(models: Sequence[Record]) -> Table:
    rows = []
    for model in models:
        search = model["search"]
        states = [trial["state"] for trial in search["trials"]]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        best = search["best"]
        parameters = ", ".join(f"{name} {_value(value)}" for name, value in best["parameters"].items())
        rows.append([model["model_type"], counts, f"{search['seconds']:.1f}", f"{best['macro_f1']:.3f}", parameters])
    headings = ("Model", "Trials", "Seconds", "Best macro F1, validation", "Its parameters")
    return Table(headings, rows)


def _counts_table(record: Record) -> Table:
    parts = record["split"]["class_counts"]
    names = list(next(iter(parts.values())))
    rows = [[name, *(f"{parts[part][name]:,}" for part in parts)] for name in names]
    rows.append(["all", *(f"{sum(parts[part].values()):,}" for part in parts)])
    return Table(("Class", *(part.capitalize() for part in parts)), rows)


# Reports


def write_report(
    record: Record,
    *,
    folder: str | os.PathLike[str],
    pictures: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
) -> Path:
    """Writes the page of a comparison, an ablation, or a pipeline's run (any other mode) as one HTML file.

    Args:
        record: with its `mode`; a summary without one is a pipeline's run.
        folder: where the pictures are.
        pictures: names of PNG files in the folder, in the order in which they are shown.
        path: the HTML file to write, whole or not at all.

    Raises:
        FileNotFoundError: a picture is not in the folder.
    """
    files = [Path(folder) / picture for picture in pictures]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist. Draw it before the report, or leave it out of `pictures`.")
    pages = {"comparison": _comparison_page, "ablation": _ablation_page}
    page = pages.get(record.get("mode"), _pipeline_page)(record, files)
    return write_atomically(path, page.to_html().encode())


def _comparison_page(record: Record, files: Sequence[Path]) -> Page:
    n_models, n_seeds = len(record["models"]), len(record["seeds"])
    sections = [Section("Result", [_models_table(record)]), Section("Pictures", _pictures(record, files))]
    if record["differences"]:
        sections.append(Section("Differences", [_differences_table(record)]))
    sections += [_data_section(record), Section("Every run", [_runs_table(record)], folded=True)]
    title = f"Comparison of {_count(n_models, 'model')} over {_count(n_seeds, 'seed')}"
    return Page(title, record["verdict"], _facts(record), sections + _how_it_was_made(record))


def _ablation_page(record: Record, files: Sequence[Path]) -> Page:
    sections = [Section("Result", [_variants_table(record)]), Section("Pictures", _pictures(record, files))]
    if record["effects"]:
        sections.append(Section("Effects", [_effects_table(record)]))
    sections += [_data_section(record), Section("Every seed", [_scores_table(record)], folded=True)]
    title = f"What each component brings to {record['model_type']}"
    return Page(title, record["verdict"], _facts(record), sections + _how_it_was_made(record))


def _pipeline_page(record: Record, files: Sequence[Path]) -> Page:
    models, best = record["models"], _best_model(record)
    of_search = [file for file in files if file.stem.startswith("optuna_")]
    sections = [Section("Result", [_pipeline_table(record), _weights(models), *_registered(record)])]
    sections.append(Section("Pictures", _pictures(record, [file for file in files if file not in of_search])))
    sections.append(Section(f"{best['model_type']}, class by class", [_classes_table(best)]))
    decided, searched = ([model for model in models if model.get(key)] for key in ("decision", "search"))
    if decided:
        sections.append(Section("Decision rule", [_decision_table(decided), _offsets_table(decided)]))
    if searched:
        sections.append(Section("Search", [_search_table(searched), *_pictures(record, of_search)], folded=True))
    time_spent = Table(
        ("Phase", "Seconds"), [(phase, f"{seconds:.1f}") for phase, seconds in record["seconds"].items()]
    )
    sections += [_data_section(record), Section("Time spent", [time_spent], folded=True)]
    title = record["experiment_name"] + (f": {record['mode']} run" if "mode" in record else "")
    return Page(title, record.get("verdict", ""), _facts(record), sections + _how_it_was_made(record))


def _best_model(record: Record) -> Record:
    return next(model for model in record["models"] if model["model_type"] == record["best_model"])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _facts(record: Record) -> list[str]:
    data = record["data"]
    facts = [
        record["created"].replace("T", " "),
        f"{_count(data['maps'], 'map')} in {_count(data['lots'], 'lot')} from {data['source']}",
    ]
    if "seeds" in record:
        facts.append(f"{'seed' if len(record['seeds']) == 1 else 'seeds'} {', '.join(map(str, record['seeds']))}")
    return facts + ([record["budget"]] if record.get("budget") else [])


def _registered(record: Record) -> list[str]:
    registered = record.get("registered")
    if not registered:
        return []
    return [f"Registered as {registered['uri']}, version {registered['version']}. {registered['verdict']}"]


def _pictures(record: Record, files: Sequence[Path]) -> list[Picture]:
    return [Picture(file, _caption(record, file.stem)) for file in files]


def _caption(record: Record, stem: str) -> str:
    """What a picture shows and what its bars are; of a picture that is not ours, its name."""
    bars = _bars(record)
    captions = {
        "seed_comparison": f"Test macro F1. Each dot is one seed, the diamond their mean. Bars: {bars}.",
        "critical_difference": f"Models by mean test macro F1; {_what_bars_join(record)}."
        if "differences" in record
        else "",
        "trade_offs": f"Mean test macro F1 against what it costs; dashed: models that no other beats. Bars: {bars}.",
        "ablation": "Left: what each component changes, alone and left out. Right: the score of each variant. "
        f"Bars on the left: {_effect_bars(record) if 'effects' in record else ''}; on the right: {bars}.",
        "model_comparison": f"Test macro F1 and what it costs. Error bars: {bars}.",
        "confusion_matrix": "Test maps by true (row) and predicted class (column): counts and shares of the class.",
        "sample_predictions": "Test maps that the best model got right, and its most confident errors.",
        "training_history": "Loss and macro F1 after each epoch of the final training; stars: the best epochs.",
    }
    if stem.startswith("optuna_"):
        return f"The search: {stem.removeprefix('optuna_').replace('_', ' ')}."
    return captions.get(stem) or stem.replace("_", " ")


def _bars(record: Record) -> str:
    """What the intervals of a record's scores are."""
    scored = record.get("models" if record.get("mode") == "comparison" else "variants")
    if "interval_method" not in record or scored is None:
        return _best_model(record)["test"]["interval_method"]
    return record["interval_method"] if any(one["interval"] for one in scored) else "none, since it takes several seeds"


def _data_section(record: Record) -> Section:
    data = record["data"]
    entries = [
        f"Source: {data['source']}",
        f"{_count(data['maps'], 'map')} in {_count(data['lots'], 'lot')}",
        *data["notes"],
    ]
    entries.append("No lot, and no exact copy of a map, is in two of the parts: training, validation and test.")
    entries.append("Validation steers training and choices; the test part is scored once, at the end.")
    if "split" not in record:
        return Section("Data and split", [Items(entries)])
    entries.append(f"Fingerprint of the split: {record['split']['fingerprint']}")
    return Section("Data and split", [Items(entries), _counts_table(record)])


def _how_it_was_made(record: Record) -> list[Section]:
    blocks = [_values(record["config"]), _values(record["environment"])]
    folded = Section("Configuration and environment", blocks, folded=True)
    return [folded, *([Section("Make it again", [Code(record["command"])])] if "command" in record else [])]


# Model card


def write_model_card(summary: Record, *, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes MODEL_CARD.md and model_card.html for the best model of a pipeline's run.

    The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993).

    Args:
        summary: of the pipeline (`experiment_summary.json`).
        folder: where the cards go; `confusion_matrix.png` and `sample_predictions.png` there are shown.

    Returns:
        The Markdown and the HTML file.
    """
    folder, model = Path(folder), _best_model(summary)
    files = [folder / "confusion_matrix.png", folder / "sample_predictions.png"]
    pictures = _pictures(summary, [file for file in files if file.is_file()])
    sections = [
        Section("What it is for", [Items(_uses(model))]),
        Section("What it is not for", [Items(_misuses(summary))]),
        Section("How good it is", [_scores_of(model), _classes_table(model), *pictures]),
        Section("Limits", [Items(_limits(summary, model))]),
        Section("How it decides", _decision(model)),
        Section("How to use it", _usage(summary, model)),
        _data_section(summary),
        Section("How it was trained", _training(summary, model)),
        Section("Licence", [_licence(model)]),
        Section("Environment", [_values(summary["environment"])]),
    ]
    page = Page(f"Model card: {model['model_type']}", _card_lead(model), _card_facts(summary), sections)
    markdown = write_atomically(folder / "MODEL_CARD.md", page.to_markdown().encode())
    return markdown, write_atomically(folder / "model_card.html", page.to_html().encode())


def _card_lead(model: Record) -> str:
    test = model["test"]
    score, absent = _with_interval(test["macro_f1"], test["intervals"]["macro_f1"]), _absent(test)
    over = f" (over the {len(test['per_class']) - len(absent)} with test maps)" if absent else ""
    return (
        f"Sorts wafer maps into {len(test['per_class'])} classes: test macro F1{over} "
        f"{score}, accuracy {_with_interval(test['accuracy'], test['intervals']['accuracy'])}, on "
        f"{_count(test['n_samples'], 'map')} from {_count(test['n_groups'], 'lot')} that it had never seen."
    )


def _card_facts(summary: Record) -> list[str]:
    registered = summary.get("registered")
    where = f"{registered['uri']}, version {registered['version']}" if registered else None
    return [summary["created"].replace("T", " "), where or "not registered", f"experiment {summary['experiment_name']}"]


def _uses(model: Record) -> list[str]:
    return [
        f"Sorting wafer maps by their failure pattern, one of: {', '.join(model['test']['per_class'])}.",
        "Finding lots and tools worth a look, ranking maps for review, counting patterns over time.",
    ]


def _misuses(summary: Record) -> list[str]:
    return [
        "Scrapping or releasing wafers without a second check.",
        f"Maps from elsewhere than {summary['data']['source']}, before it was measured on labelled lots from there.",
        "Maps with several patterns at once: it names one.",
        "Patterns that are not in the list: it has no answer for them and names the nearest, at times with confidence.",
        "Reading its confidence as a probability, before the calibration error below was judged good enough.",
    ]


def _scores_of(model: Record) -> Table:
    test, labels = (
        model["test"],
        {"macro_f1": "Macro F1", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"},
    )
    labels |= {"expected_calibration_error": "Expected calibration error"}
    rows = [
        [label, *(_with_interval(model[part][key], model[part]["intervals"][key]) for part in ("test", "validation"))]
        for key, label in labels.items()
    ]
    area = [format_number(model[part]["roc_auc_ovr"], "{:.3f}") for part in ("test", "validation")]
    rows.append(["Area under the ROC curve, one against the rest", *area])
    note = f"In brackets, of the test part: {test['interval_method']}. Validation was used to choose."
    return Table(("Score", "Test", "Validation"), rows, note=note)


def _limits(summary: Record, model: Record) -> list[str]:
    test = model["test"]
    classes, config = test["per_class"], summary["config"]
    limits = [f"The test part has {_count(test['n_samples'], 'map')} from {_count(test['n_groups'], 'lot')}."]
    known = {name: row for name, row in classes.items() if row["support"]}
    if absent := _absent(test):
        limits.append(f"No test map, so nothing is known of: {', '.join(absent)}. They are in no average.")
    few = [f"{name} ({row['support']})" for name, row in known.items() if row["support"] < FEW_MAPS]
    if few:
        limits.append(f"Fewer than {FEW_MAPS} test maps, so known only roughly: {', '.join(few)}.")
    alone = [name for name, row in known.items() if row["f1_interval"] is None]
    if alone:
        limits.append(f"In fewer than two test lots, so without an interval: {', '.join(alone)}.")
    weakest = sorted(known, key=lambda name: known[name]["f1"])[:3]
    limits.append("Weakest classes: " + ", ".join(f"{name} (F1 {classes[name]['f1']:.3f})" for name in weakest) + ".")
    limits += _confusions(test)
    if "none" in classes and test["n_samples"]:
        share = classes["none"]["support"] / test["n_samples"]
        limits.append(
            f"{share:.1%} of the test maps are 'none'. With another share, precision and accuracy will differ."
        )
    if str(config["data"]) == "synthetic":
        limits.append("All maps are generated. How it does on real wafers has not been measured here.")
    limits.append(
        f"Trained once, with seed {config['seed']}: how far another training would differ is not in the intervals."
    )
    return [*limits, "Not tested: other products and lines, changes over time, maps with wrong or missing dies."]


def _confusions(test: Record) -> list[str]:
    """The three most frequent errors."""
    names, counts = list(test["per_class"]), np.array(test["confusion_matrix"])
    np.fill_diagonal(counts, 0)
    worst = [divmod(int(cell), len(names)) for cell in np.argsort(-counts, axis=None, kind="stable")[:3]]
    errors = [
        f"{names[true]} taken for {names[named]} ({counts[true, named]})"
        for true, named in worst
        if counts[true, named]
    ]
    return [f"Most frequent errors on test: {', '.join(errors)}."] if errors else []


def _decision(model: Record) -> list[str | Table]:
    rule = model.get("decision")
    if not rule:
        return ["The class with the highest probability (softmax of the network's output)."]
    views = "one view of the map" if rule["views"] == 1 else f"the mean over {rule['views']} symmetries of the map"
    text = (
        f"Probabilities are {views}, at temperature {rule['temperature']:.3f}, with class offsets for a prior of "
        f"strength {rule['prior_strength']:.2f}; the highest one names the class. The rule was fitted on validation."
    )
    return [text, _decision_table([model]), _offsets_table([model])]


def _usage(summary: Record, model: Record) -> list[str | Items | Code]:
    names = ", ".join(model["test"]["per_class"])
    contract = Items(
        [
            "In: maps as uint8 [rows, columns], any size: 0 no die, 1 pass, 2 fail. Resizing is part of the model.",
            f"Out: probabilities, float32 [maps, {len(model['test']['per_class'])}], in this order: {names}.",
        ]
    )
    registered, config = summary.get("registered"), summary["config"]
    if not registered:
        return [*_unregistered_usage(summary, model), contract]
    uri = config.get("tracking_uri") or "sqlite:///mlflow.db"
    code = f"""\
from pathlib import Path

import mlflow
import numpy as np

from deployment import OnnxClassifier

mlflow.set_tracking_uri({uri!r})
folder = mlflow.artifacts.download_artifacts("{registered["uri"]}")
classifier = OnnxClassifier(next(Path(folder).glob("*.onnx")))
wafer_map = np.ones((30, 28), dtype=np.uint8)  # yours
probabilities = classifier.predict([wafer_map])
print(classifier.class_names[probabilities[0].argmax()], probabilities[0].max())"""
    apart = registered["largest_difference_to_checkpoint"]
    parity = f"The file's probabilities differ from the trained checkpoint's by at most {apart:.1e} on the test maps."
    where = "" if config.get("tracking_uri") else " In the folder where mlflow.db is:"
    return [f"{registered['verdict']}{where}", Code(code), contract, parity]


def _unregistered_usage(summary: Record, model: Record) -> list[str | Code]:
    code = """\
import json

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

summary = json.load(open("experiment_summary.json"))
record = next(m for m in summary["models"] if m["model_type"] == summary["best_model"])
model = IntegratedMLPipeline(ExperimentConfig(**summary["config"])).load_model(record)"""
    file = f"checkpoints/{summary['experiment_name']}/{model['model_type']}/{model['checkpoint']}"
    return [f"It was not registered. Its weights are in {file}:", Code(code)]


def _training(summary: Record, model: Record) -> list[str | Items | Table]:
    config = summary["config"]
    facts = [
        f"Seed {config['seed']}, for data, split, initial weights and batches.",
        f"Started from weights: {model['weights']}.",
        f"Weights kept: epoch {model['best_epoch']} of {model['epochs']} of the final training, best on validation.",
        f"{model['n_parameters']:,} parameters; {model['train_seconds']:.1f} s of training, in {model['precision']}; "
        f"{model['latency_ms']:.2f} ms a map on the CPU.",
    ]
    if model.get("weights_from", "final training") != "final training":
        facts[2] = (
            f"Weights kept: those of {model['weights_from']} of the search, better on validation than the final one."
        )
    if model.get("search"):
        facts.append(
            f"Parameters found in {_count(len(model['search']['trials']), 'trial')} ({model['search']['sampler']})."
        )
    return [Items(facts), _values(model["parameters"], headings=("Parameter", "Value"))]


def _licence(model: Record) -> str:
    if model["model_type"] == "yolo_inspired":
        return (
            "The network is built from ultralytics, which is under AGPL-3.0: whoever distributes or serves this model, "
            "or a program with it, has to follow that licence or hold another one from ultralytics."
        )
    return (
        "Only `yolo_inspired` is built from ultralytics (AGPL-3.0), this model is not. The licences of the maps and of "
        "the weights that it started from apply."
    )

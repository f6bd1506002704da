"""Figures as text: for the terminal, for CSV, and in the Markdown that templates make of them.

The templates beside this module (`templates/*.md.j2`) hold the prose and the tables. Whatever they print passes through
`markdown`, so that a name or note from the data is shown as it is and is never a tag, a link or a further column.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from waferlab.records import write_atomically

Record = Mapping[str, Any]
TEMPLATES = Path(__file__).resolve().parent / "templates"
CONTEXTS = {  # how a component is tried, and what the difference is
    "alone": "added to the baseline",
    "left out": "everything against everything but it",
}
SCORES = {  # of a model, with an interval each
    "macro_f1": "Macro F1",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "expected_calibration_error": "Expected calibration error",
}
# What Markdown would read as its own: signs anywhere, and the beginnings of lists, headings, rules and definitions.
SIGNS = re.compile(r"[\\`*|~]|(?<![^\W_])_|_(?![^\W_])|(?<=\])[(:]")
BEGINNINGS = re.compile(r"^\d*(?=[.)](?: |$)|[-+#=][ #=+-]|[+#=]$|\[)")


def write_per_class_table(metrics: Mapping[str, Any], *, path: str | os.PathLike[str]) -> Path:
    """Writes what `compute_metrics` returned as CSV, one class a row.

    An interval that does not exist stays empty; scores of a class without maps are a dash.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "support", "precision", "recall", "f1", "f1_low", "f1_high"])
    for name, row in metrics["per_class"].items():
        scores = [format_number(row[key], "{:.4f}") for key in ("precision", "recall", "f1")]
        ends = ["", ""] if row["f1_interval"] is None else [f"{end:.4f}" for end in row["f1_interval"]]
        writer.writerow([name, row["support"], *scores, *ends])
    return write_atomically(path, text.getvalue().encode())


# Figures as text


def format_number(value: float | None, form: str = "{:.3f}", *, factor: float = 1) -> str:
    """A number as text; a dash where there is none."""
    return "-" if value is None else form.format(value * factor)


def with_interval(value: float | None, interval: Sequence[float] | None, form: str = "{:.3f}") -> str:
    """A score with its interval in brackets, if it has one."""
    bounds = "" if interval is None else f" [{', '.join(form.format(end) for end in interval)}]"
    return format_number(value, form) + bounds


def _p_value(p: float | None) -> str:
    return "<0.001" if p is not None and p < 0.001 else format_number(p)


def _setting(value: Any) -> str:
    """A value of the configuration or environment."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)  # a path is not in JSON's types


def _settings(mapping: Record) -> str:
    return ", ".join(f"{name} {_setting(value)}" for name, value in mapping.items())


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# What records say


def by_score(record: Record) -> list[Record]:
    """The models, highest mean first."""
    if not record["models"]:
        raise ValueError("the record has no model: a comparison needs at least one that was trained")
    return sorted(record["models"], key=lambda model: -model["mean"])


def best_model(summary: Record) -> Record:
    """The one that a pipeline's run has chosen."""
    return next(model for model in summary["models"] if model["model_type"] == summary["best_model"])


def score_bars(scored: Sequence[Record], record: Record) -> str:
    """What the bars of models or variants are."""
    return record["interval_method"] if any(one["interval"] for one in scored) else "none, since it takes several seeds"


def tested(differences: Sequence[Record]) -> list[Record]:
    """Those with a p value: it takes more than one seed."""
    return [difference for difference in differences if difference["p"] is not None]


def what_bars_join(record: Record) -> str:
    """What a bar over several models says."""
    if not tested(record["differences"]):
        return "no pair was tested, so there are no bars: that takes two models and more than one seed"
    return f"bars join models that are not shown to differ: {record['difference_method']}"


def effect_bars(record: Record) -> str:
    """What the bars of an ablation's effects are."""
    if not record["effects"]:
        return "none, no component was measured both with and without"
    if not any(effect["interval"] for effect in record["effects"]):
        return "none, since it takes several seeds"
    return record["difference_method"]


def about(variant: Record) -> tuple[str, str] | None:
    """The component that a variant measures and its context; None for the baseline and for everything."""
    on, off = ([name for name, used in variant["components"].items() if used is switch] for switch in (True, False))
    if len(on) == 1:
        return on[0], "alone"
    return (off[0], "left out") if on and len(off) == 1 else None


def _verdict(record: Record, variant: Record) -> str:
    """On the component that a variant is measured for, with minus without it."""
    effect = next((e for e in record["effects"] if (e["component"], e["context"]) == about(variant)), None)
    if effect is None:
        return "-"
    name, verdict = effect["component"], effect["verdict"]
    words = f"no effect of {name} shown" if verdict == "no effect shown" else f"{name} {verdict}"
    corrected = "" if effect["p_corrected"] is None else f", p {_p_value(effect['p_corrected'])}"
    return f"{words}: {with_interval(effect['difference'], effect['interval'], '{:+.3f}')}{corrected}"


def _gain(record: Record, variant: Record) -> str:
    """Over the baseline, also as a share of it."""
    baseline = next((v for v in record["variants"] if not any(v["components"].values())), variant)
    if variant is baseline:
        return "-"
    gain = variant["mean"] - baseline["mean"]
    return f"{gain:+.3f}" + (f" ({gain / baseline['mean']:+.1%})" if baseline["mean"] else "")


def _costs(row: Record) -> list[str]:
    """Parameters, seconds of training and latency of a model or run."""
    forms = {"n_parameters": "{:,.0f}", "train_seconds": "{:,.1f}", "latency_ms": "{:,.2f}"}
    return [format_number(row.get(key), form) for key, form in forms.items()]


def classes_absent(test: Record) -> list[str]:
    """The classes of which there is no test map."""
    return [name for name, row in test["per_class"].items() if not row["support"]]


def _class_scores(row: Record) -> list[str]:
    """F1, precision and recall, dashes if there is no map of the class, which some records give as 0."""
    known, interval = bool(row["support"]), row["f1_interval"]
    return [with_interval(row[key] if known else None, interval if key == "f1" else None) for key in ("f1", "precision", "recall")]


def _class_offsets(model: Record) -> list[str]:
    """What the decision rule adds to each class's log probability; a rule that leans to no class lists none."""
    rule = model["decision"]
    offsets = [offset for label, offset in enumerate(rule["offsets"]) if label not in rule.get("left_out", ())]
    return [f"{offset:+.3f}" for offset in offsets or [0.0] * len(model["test"]["per_class"])]


def _change(rule: Record, what: str) -> str:
    """From the plain model to that with the decision rule."""
    return f"{format_number(rule.get(f'{what}_before'))} → {format_number(rule.get(f'{what}_after'))}"


def _trial_counts(search: Record) -> str:
    states = Counter(trial["state"] for trial in search["trials"])
    return ", ".join(f"{number} {state}" for state, number in states.items())


# Markdown


def markdown(value: Any) -> Markup:
    """Text that Markdown shows as it is, on one line: no tag, no link or picture, no further column.

    Templates pass all that they print through it; what is `Markup` already is left alone.
    """
    if hasattr(value, "__html__"):
        return value
    text = html.escape(" ".join(str(value).split()), quote=False)
    return Markup(BEGINNINGS.sub(r"\g<0>\\", SIGNS.sub(r"\\\g<0>", text)))


def _row(*cells: Any, best: bool = False) -> Markup:
    """A table's row, bold if it is the best; a list stands for several cells."""
    bold, flat = "**" if best else "", (c for cell in cells for c in (cell if isinstance(cell, list) else [cell]))
    return Markup("| " + " | ".join(f"{bold}{markdown(cell)}{bold}" for cell in flat) + " |")


def _picture(file: Path, caption: str) -> Markup:
    """A picture with its caption, in which a bracket could end it."""
    caption = re.sub(r"[][]", r"\\\g<0>", caption.strip())
    return Markup(f"![{caption}]({quote(file.as_posix())})")


def _code(text: str) -> Markup:
    return Markup(textwrap.indent(text, "    "))  # by indentation, since a text may hold a fence


@cache
def templates() -> Environment:
    """Where pages come from; a figure that a record lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=markdown, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "CONTEXTS": CONTEXTS, "SCORES": SCORES, "best_model": best_model, "by_score": by_score, "change": _change,
        "class_offsets": _class_offsets, "class_scores": _class_scores, "classes_absent": classes_absent,
        "costs": _costs, "counted": _counted, "effect_bars": effect_bars, "gain": _gain, "picture": _picture,
        "row": _row, "score_bars": score_bars, "trial_counts": _trial_counts, "verdict": _verdict,
        "what_bars_join": what_bars_join,
    }  # fmt: skip
    environment.filters |= {
        "code": _code, "number": format_number, "p": _p_value, "score": with_interval, "setting": _setting,
        "settings": _settings,
    }  # fmt: skip
    return environment


def fill_in(template: str, **figures: Any) -> str:
    """A page in Markdown, by the name of its template."""
    return _tidy(templates().get_template(f"{template}.md.j2").render(**figures))


def comparison_markdown(record: Record) -> str:
    """The models of a comparison as a Markdown table, and below it their paired differences, if any were tested."""
    tables = templates().get_template("tables.md.j2").module
    return _tidy(tables.models(record) + ("\n\n" + tables.differences(record) if record["differences"] else "")).rstrip()


def ablation_markdown(record: Record) -> str:
    """The variants of an ablation as a Markdown table, with the verdict on the component that each is about."""
    return _tidy(templates().get_template("tables.md.j2").module.variants(record)).rstrip()


def _tidy(text: str) -> str:
    """With one empty line where templates left several."""
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

"""Records set into templates: `templates/*.md.j2` hold the prose, what is here are the figures that they ask for.

Whatever a template prints passes through `tables.markdown`, so that a name or note from the data is shown as it is.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from waferlab.reports import tables
from waferlab.reports.tables import Record, format_number, markdown, with_interval

TEMPLATES = Path(__file__).resolve().parent / "templates"
SCORES = {  # of a model, with an interval each
    "macro_f1": "Macro F1",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "expected_calibration_error": "Expected calibration error",
}


def fill_in(template: str, **figures: Any) -> str:
    """A page in Markdown, by the name of its template."""
    return _tidy(templates().get_template(f"{template}.md.j2").render(**figures))


def _tidy(text: str) -> str:
    """With one empty line where templates left several, and no blank at the end of a line."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +$", "", text, flags=re.MULTILINE)).strip() + "\n"


@cache
def templates() -> Environment:
    """Where pages come from; a figure that a record lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=markdown, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "CONTEXTS": tables.CONTEXTS, "SCORES": SCORES, "best_model": best_model, "change": _change,
        "class_offsets": _class_offsets, "class_scores": _class_scores, "classes_absent": classes_absent,
        "costs": tables.costs, "counted": _counted, "differences_table": tables.differences_table,
        "effect_bars": tables.effect_bars, "models_table": tables.models_table, "picture": _picture,
        "row": tables.markdown_row, "score_bars": tables.score_bars, "sets_in_words": tables.sets_in_words,
        "sets_table": tables.sets_table, "trial_counts": _trial_counts,
        "variants_table": tables.variants_table, "what_bars_join": tables.what_bars_join,
    }  # fmt: skip
    environment.filters |= {
        "code": _code, "number": format_number, "p": tables.p_value, "score": with_interval, "setting": _setting,
        "settings": _settings, "table": tables.table_markdown,
    }  # fmt: skip
    return environment


def best_model(summary: Record) -> Record:
    """The one that a pipeline's run has chosen."""
    return next(model for model in summary["models"] if model["model_type"] == summary["best_model"])


def classes_absent(test: Record) -> list[str]:
    """The classes of which there is no test map."""
    return [name for name, row in test["per_class"].items() if not row["support"]]


def _class_scores(row: Record) -> list[str]:
    """F1, precision and recall, dashes if there is no map of the class, which some records give as 0."""
    if not row["support"]:
        return ["-"] * 3
    return [with_interval(row["f1"], row["f1_interval"]), format_number(row["precision"]), format_number(row["recall"])]


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


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _setting(value: Any) -> str:
    """A value of the configuration or environment."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)  # a path is not in JSON's types


def _settings(mapping: Record) -> str:
    return ", ".join(f"{name} {_setting(value)}" for name, value in mapping.items())


def _picture(file: Path, caption: str) -> Markup:
    """A picture with its caption, in which a bracket could end it."""
    caption = re.sub(r"[][]", r"\\\g<0>", caption.strip())
    return Markup(f"![{caption}]({quote(file.as_posix())})")


def _code(text: str) -> Markup:
    return Markup(textwrap.indent(text, "    "))  # by indentation, since a text may hold a fence

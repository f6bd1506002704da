"""Figures as text: for the terminal, for CSV and in Markdown.

Here are the tables that are printed and written; those of pages alone are in their templates.
"""

from __future__ import annotations

import csv
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from waferlab.evaluation.conformal import least_lots
from waferlab.records import ModelResult
from waferlab.tracking.whole_files import write_atomically

Record = Mapping[str, Any]
CONTEXTS = {  # how a component is tried, and what the difference is
    "alone": "added to the baseline",
    "left out": "everything against everything but it",
}
COSTS = {  # by heading: key and form
    "Parameters": ("n_parameters", "{:,.0f}"),
    "Training (s)": ("train_seconds", "{:,.1f}"),
    "Latency (ms)": ("latency_ms", "{:,.2f}"),
}
# What Markdown would read as its own: signs anywhere, and the beginnings of lists, headings, rules and definitions.
LONGER = 1.1  # times: trainings that differ more in their seconds are not ranked against each other
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
        writer.writerow([no_formula(name), row["support"], *scores, *ends])
    return write_atomically(path, text.getvalue().encode())


def no_formula(cell: Any) -> Any:
    """Puts a quote before what a spreadsheet would compute (OWASP, "CSV Injection"); "-12" stays as it is."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


# Figures as text


def format_number(value: float | None, form: str = "{:.3f}", *, factor: float = 1) -> str:
    """A number as text; a dash where there is none."""
    return "-" if value is None else form.format(value * factor)


def with_interval(value: float | None, interval: Sequence[float] | None, form: str = "{:.3f}") -> str:
    """A score with its interval in brackets, if it has one."""
    bounds = "" if interval is None else f" [{', '.join(form.format(end) for end in interval)}]"
    return format_number(value, form) + bounds


def p_value(p: float | None) -> str:
    """A p value as text; a dash where nothing was tested."""
    return "<0.001" if p is not None and p < 0.001 else format_number(p)


# What records say


def sets_in_short(sets: Record) -> str:
    """What prediction sets leave to answer alone, and how often that is wrong; see `conformal.evaluate_sets`."""
    wrong = format_number(sets["error_alone"], "{:.1%}")
    return f"{sets['alone']:.1%} answered alone, {wrong} of them wrong (prediction sets at {sets['coverage']:.0%})"


def sets_in_words(sets: Record) -> str:
    """How many test maps are answered alone, how well, and why the rest are not."""
    first = f"{sets['alone']:.1%} of the test maps are answered alone"
    if sets["error_alone"] is not None:
        first += f", {sets['error_alone']:.1%} of them wrongly (all maps, each answered: {sets['error']:.1%})"
    rest = 1 - sets["alone"]
    if rest < 1e-9:
        return f"{first}."
    another = max(0.0, rest - sets["several"] - sets["none"])
    parts = [f"{sets['several'] / rest:.0%} have several classes in their set", f"{sets['none'] / rest:.0%} none"]
    if another > 1e-9:
        parts.append(f"{another / rest:.0%} one that is not the likeliest")
    return f"{first}; of the rest {', '.join(parts[:-1])} and {parts[-1]}."


def sets_table(model: Record) -> Table:
    """The promise for each class, and what became of it on lots that nobody had seen."""
    sets, rows = model["sets"], []
    needed = least_lots(sets["coverage"])
    for name, row in sets["per_class"].items():
        promise = f"{sets['coverage']:.0%}" if row["promised"] else f"no promise: {row['lots_fitted']} of {needed} lots"
        counts = [f"{row[key]:,}" for key in ("lots_fitted", "lots", "maps")]
        rows.append([name, promise, counts[0], with_interval(row["covered"], row["interval"]), *counts[1:]])
    headings = ("Class", "Promised coverage", "Lots fitted on", "Coverage on test lots", "Test lots", "Test maps")
    note = (
        "Coverage: how often a map's set holds its true class, as the mean over lots, since lots and not maps are what "
        "the promise is of; in brackets its 95% interval over test lots. The promise is a mean over validation parts, "
        "too: a single one may fall short of it or hold more."
    )
    return Table(headings, rows, note=note)


def by_score(record: Record) -> list[Record]:
    """The models, highest mean first."""
    if not record["models"]:
        raise ValueError("the record has no model: a comparison needs at least one that was trained")
    return sorted(record["models"], key=lambda model: -model["mean"])


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
    on = [name for name, used in variant["components"].items() if used]
    off = [name for name, used in variant["components"].items() if not used]
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
    corrected = "" if effect["p_corrected"] is None else f", p {p_value(effect['p_corrected'])}"
    return f"{words}: {with_interval(effect['difference'], effect['interval'], '{:+.3f}')}{corrected}"


def _gain(record: Record, variant: Record) -> str:
    """Over the baseline, also as a share of it."""
    baseline = next((v for v in record["variants"] if not any(v["components"].values())), variant)
    if variant is baseline:
        return "-"
    gain = variant["mean"] - baseline["mean"]
    return f"{gain:+.3f}" + (f" ({gain / baseline['mean']:+.1%})" if baseline["mean"] else "")


def costs(row: Record) -> list[str]:
    """Parameters, seconds of training and latency of a model or run."""
    return [format_number(row.get(key), form) for key, form in COSTS.values()]


# Tables


@dataclass(frozen=True)
class Table:
    """Rows of text; columns of numbers are set flush right, the row `best` bold, `note` stands below."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None
    note: str = ""

    def is_number(self, column: int) -> bool:
        """Whether each cell of a column (but for dashes) begins with a number."""
        cells = [row[column] for row in self.rows if row[column] != "-"]
        return all(re.match(r"[<+-]?\d[\d,.%M]*($|[ /±→])", cell) for cell in cells)


def best_row(scores: Sequence[float | None]) -> int | None:
    """The row to set bold; with one row there is nothing to choose."""
    known = [index for index, score in enumerate(scores) if score is not None]
    return max(known, key=lambda index: scores[index]) if known and len(scores) > 1 else None


def comparison_rows(results: Sequence[ModelResult]) -> list[dict[str, Any]]:
    """The figures of each model that the comparison table and picture show."""
    return [
        {
            "model_type": r.model_type,
            "accuracy": r.test["accuracy"],
            "macro_f1": r.test["macro_f1"],
            "macro_f1_interval": (r.test["intervals"] or {}).get("macro_f1"),
            "n_parameters": r.n_parameters,
            "train_seconds": r.train_seconds,
            "latency_ms": r.latency_ms,
        }
        for r in results
    ]


def results_table(results: Sequence[Mapping[str, Any]], *, chosen: str | None = None) -> Table:
    """The models of a run; the one that validation chose in bold, what was not measured as a dash.

    Args:
        results: a dict for each model with model_type and any of accuracy, macro_f1, macro_f1_interval, n_parameters,
            train_seconds, latency_ms.
        chosen: a model_type among them.
    """
    rows = [
        [
            str(result["model_type"]),
            format_number(result.get("accuracy")),
            with_interval(result.get("macro_f1"), result.get("macro_f1_interval")),
            format_number(result.get("n_parameters"), "{:.3g}M", factor=1e-6),
            format_number(result.get("train_seconds"), "{:,.0f}"),
            format_number(result.get("latency_ms"), "{:,.2f}"),
        ]
        for result in results
    ]
    headings = ("Model", "Accuracy", "Macro F1\n[95% interval]", "Params", "Time\n(s)", "Latency\n(ms)")
    names = [result["model_type"] for result in results]
    return Table(headings, rows, best=names.index(chosen) if chosen in names and len(names) > 1 else None)


def models_table(record: Record) -> Table:
    """The models of a comparison, the best first."""
    models = by_score(record)
    rows = [
        [
            model["model_type"],
            with_interval(model["mean"], model["interval"]),
            format_number(model["std"]),
            str(model["n"]),
            format_number(model["accuracy_mean"]),
            *costs(model),
            format_number(model["epochs"], "{:.1f}"),
        ]
        for model in models
    ]
    headings = ("Model", "Macro F1 (mean)", "SD", "Seeds", "Accuracy", *COSTS, "Epochs")
    one = "no interval: it takes more than one seed"
    brackets = f"in brackets: {record['interval_method']}" if any(model["interval"] for model in models) else one
    note = f"All scores are of the test part, means over seeds; SD: standard deviation over seeds; {brackets}."
    if apart := record.get("not_ranked"):
        return Table(headings, rows, note=f"{note} {apart}")
    return Table(headings, rows, best=best_row([model["mean"] for model in models]), note=note)


def not_ranked(trained: Sequence[tuple[str, float, int]]) -> str | None:
    """Why rows, each with its weights, seconds and trials, are not ranked against each other; None if they may be."""
    weights, seconds, trials = zip(*trained, strict=True)
    reasons = [
        *(["weights"] if len(set(weights)) > 1 else []),
        *(["seconds"] if max(seconds) > LONGER * min(seconds) else []),
        *(["search"] if (min(trials) == 0) != (max(trials) == 0) else []),
    ]
    return f"The rows are not ranked against each other: they differ in {' and '.join(reasons)}." if reasons else None


def differences_table(record: Record) -> Table:
    """Every pair of models, with what is shown of it."""
    rows = [
        [
            f"{pair['a']} against {pair['b']}",
            with_interval(pair["difference"], pair["interval"], "{:+.3f}"),
            p_value(pair["p"]),
            p_value(pair["p_corrected"]),
            _who_is_better(pair),
        ]
        for pair in record["differences"]
    ]
    note = f"Difference in macro F1, first minus second: {record['difference_method']}."
    return Table(("Models", "Difference", "p", "p, corrected", "Verdict"), rows, note=note)


def _who_is_better(pair: Record) -> str:
    if pair["p"] is None:
        return "not tested"
    better = pair["a"] if pair["difference"] > 0 else pair["b"]
    return f"{better} is better" if pair["significant"] else "no difference shown"


def variants_table(record: Record) -> Table:
    """The variants of an ablation, each with the verdict on the component that it is about."""
    variants, effects = record["variants"], record["effects"]
    rows = [
        [v["name"], with_interval(v["mean"], v["interval"]), _gain(record, v), _verdict(record, v)] for v in variants
    ]
    bars = f"in brackets: {record['interval_method']}" if any(v["interval"] for v in variants) else "one seed"
    note = f"Mean macro F1 of the test part over seeds, {bars}. Verdicts: with the component minus without it."
    if any(effect["p_corrected"] is not None for effect in effects):
        note += (
            f" Shown: p below 0.05 after correction for {len(effects) + 1} comparisons (Holm 1979); the intervals in "
            "the verdicts are corrected likewise, those of the means are not."
        )
    headings = ("Configuration", "Macro F1 (mean)", "Difference to baseline", "Verdict")
    return Table(headings, rows, best=best_row([variant["mean"] for variant in variants]), note=note)


# Markdown


def markdown(value: Any) -> Markup:
    """Text that Markdown shows as it is, on one line: no tag, no link or picture, no further column.

    Templates pass all that they print through it; what is `Markup` already is left alone.
    """
    if hasattr(value, "__html__"):
        return value
    text = html.escape(" ".join(str(value).split()), quote=False)
    return Markup(BEGINNINGS.sub(r"\g<0>\\", SIGNS.sub(r"\\\g<0>", text)))


def markdown_row(*cells: Any, best: bool = False) -> Markup:
    """A table's row, bold if it is the best; a list stands for several cells."""
    bold, flat = "**" if best else "", (c for cell in cells for c in (cell if isinstance(cell, list) else [cell]))
    return Markup("| " + " | ".join(f"{bold}{markdown(cell)}{bold}" for cell in flat) + " |")


def table_markdown(table: Table) -> Markup:
    """The table as GitHub and markdown-it read it, with its note below."""
    sides = [Markup("---:" if table.is_number(column) else "---") for column in range(len(table.headings))]
    rows = [markdown_row(*row, best=index == table.best) for index, row in enumerate(table.rows)]
    note = ["", markdown(table.note)] if table.note else []
    return Markup("\n".join([markdown_row(*table.headings), markdown_row(*sides), *rows, *note]))


def comparison_markdown(record: Record) -> str:
    """The models of a comparison as a Markdown table, and below it their paired differences, if any were tested."""
    tables = [models_table(record), *([differences_table(record)] if record["differences"] else [])]
    return "\n\n".join(map(table_markdown, tables))


def ablation_markdown(record: Record) -> str:
    """The variants of an ablation as a Markdown table, with the verdict on the component that each is about."""
    return str(table_markdown(variants_table(record)))

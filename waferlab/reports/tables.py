"""Figures as text: tables for the terminal, for CSV, and for pages."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from waferlab.records import ModelResult, write_atomically
from waferlab.reports.style import PALETTE


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


def format_number(value: float | None, form: str, *, factor: float = 1) -> str:
    """A number as text; a dash where there is none."""
    return "-" if value is None else form.format(value * factor)


Record = Mapping[str, Any]
CONTEXTS = {  # how a component is tried: marker, colour, and what the difference is
    "alone": ("o", PALETTE[0], "alone: added to the baseline"),
    "left out": ("s", PALETTE[1], "left out: everything against everything but it"),
}


def what_bars_join(record: Record) -> str:
    if not tested_only(record["differences"]):
        return "no pair was tested, so there are no bars: that takes two models and more than one seed"
    return f"bars join models that are not shown to differ: {record['difference_method']}"


def tested_only(differences: Sequence[Record]) -> list[Record]:
    return [difference for difference in differences if difference["p"] is not None]


def effect_bars(record: Record) -> str:
    if not record["effects"]:
        return "none, no component was measured both with and without"
    if not any(effect["interval"] for effect in record["effects"]):
        return "none, since it takes several seeds"
    return record["difference_method"]


def by_score(record: Record) -> list[Record]:
    """The models, highest mean first."""
    if not record["models"]:
        raise ValueError("the record has no model: a comparison needs at least one that was trained")
    return sorted(record["models"], key=lambda model: -model["mean"])


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


def table_markdown(table: Table) -> str:
    sides = ["---:" if table.is_number(column) else "---" for column in range(len(table.headings))]
    rows = [[plain_markdown(cell) for cell in row] for row in table.rows]
    if table.best is not None:
        rows[table.best] = [f"**{cell}**" for cell in rows[table.best]]
    lines = [map(plain_markdown, table.headings), sides, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\n{plain_markdown(table.note)}" if table.note else ""
    )


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no tag, no link or picture, no further column."""
    escaped = html.escape(text, quote=False).replace("](", "]\\(").replace("|", "\\|")
    return " ".join(escaped.split("\n"))


def with_interval(value: float | None, interval: Sequence[float] | None, form: str = "{:.3f}") -> str:
    bounds = "" if interval is None else f" [{', '.join(form.format(end) for end in interval)}]"
    return format_number(value, form) + bounds


def _p_value(p: float | None) -> str:
    return "<0.001" if p is not None and p < 0.001 else format_number(p, "{:.3f}")


def _value(value: Any) -> str:
    """A value of the configuration or environment."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)  # a path is not in JSON's types


def values_table(mapping: Record, *, headings: tuple[str, str] = ("Name", "Value")) -> Table:
    return Table(headings, [(key, _value(value)) for key, value in mapping.items()])


def _costs(row: Record) -> list[str]:
    """Parameters, seconds of training and latency of a model or run."""
    forms = {"n_parameters": "{:,.0f}", "train_seconds": "{:,.1f}", "latency_ms": "{:,.2f}"}
    return [format_number(row.get(key), form) for key, form in forms.items()]


def _best(rows: Sequence[Record], key: Callable[[Record], float]) -> int | None:
    """The row to set bold; with one row there is nothing to choose."""
    return max(range(len(rows)), key=lambda index: key(rows[index])) if len(rows) > 1 else None


def comparison_markdown(record: Record) -> str:
    """The models of a comparison as a Markdown table, and below it their paired differences, if any were tested."""
    tables = [models_table(record), *([differences_table(record)] if record["differences"] else [])]
    return "\n\n".join(map(table_markdown, tables))


def ablation_markdown(record: Record) -> str:
    """The variants of an ablation as a Markdown table, with the verdict on the component that each is about."""
    return table_markdown(variants_table(record))


def models_table(record: Record) -> Table:
    models = by_score(record)
    rows = [
        [
            model["model_type"],
            with_interval(model["mean"], model["interval"]),
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


def differences_table(record: Record) -> Table:
    rows = [
        [
            f"{difference['a']} against {difference['b']}",
            with_interval(difference["difference"], difference["interval"], "{:+.3f}"),
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


def runs_table(record: Record) -> Table:
    rows = [
        [
            run["model_type"],
            str(run["seed"]),
            with_interval(run["macro_f1"], run["macro_f1_interval"]),
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


def variants_table(record: Record) -> Table:
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
                with_interval(variant["mean"], variant["interval"]),
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
    return f"{verdict}: {with_interval(effect['difference'], effect['interval'], '{:+.3f}')}{corrected}"


def effects_table(record: Record) -> Table:
    rows = [
        [
            effect["component"],
            effect["context"],
            with_interval(effect["difference"], effect["interval"], "{:+.3f}"),
            _p_value(effect["p"]),
            _p_value(effect["p_corrected"]),
            effect["verdict"],
        ]
        for effect in record["effects"]
    ]
    contexts = "; ".join(words for _, _, words in CONTEXTS.values())
    note = f"Difference in macro F1, with the component minus without it: {record['difference_method']}. {contexts}."
    return Table(("Component", "Context", "Difference", "p", "p, corrected", "Verdict"), rows, note=note)


def scores_table(record: Record) -> Table:
    rows = [
        [variant["name"], *map("{:.3f}".format, variant["scores"]), format_number(variant["std"], "{:.3f}")]
        for variant in record["variants"]
    ]
    return Table(("Configuration", *(f"Seed {seed}" for seed in record["seeds"]), "SD"), rows)


def pipeline_table(record: Record) -> Table:
    models = record["models"]
    rows = [
        [
            model["model_type"],
            with_interval(model["test"]["macro_f1"], model["test"]["intervals"]["macro_f1"]),
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
    note = f"Bold: {record['best_model_rule']}. In brackets: {test['interval_method']}.{classes_left_out(test)}"
    return Table(headings, rows, best=best if len(rows) > 1 else None, note=note)


def classes_absent(test: Record) -> list[str]:
    """The classes of which there is no test map."""
    return [name for name, row in test["per_class"].items() if not row["support"]]


def classes_left_out(test: Record) -> str:
    """A sentence, with a space before it, on classes that are in no average; nothing if all have maps."""
    absent = classes_absent(test)
    return f" No test map of {', '.join(absent)}: without a score, and in no average." if absent else ""


def weights_items(models: Sequence[Record]) -> Items:
    """What each training started from, and which of the weights that it came by were kept."""
    return Items(
        [
            f"{model['model_type']}: first weights {model['weights']}; final weights from the "
            f"{model.get('weights_from', 'final training')}."
            for model in models
        ]
    )


def classes_table(model: Record) -> Table:
    classes = model["test"]["per_class"]
    rows = [
        [name, *(_of_class(row, key) for key in ("f1", "precision", "recall")), f"{row['support']:,}"]
        for name, row in classes.items()
    ]
    note = f"In brackets: {model['test']['interval_method']}; none where fewer than two test lots hold the class."
    note += classes_left_out(model["test"])
    return Table(("Class", "F1", "Precision", "Recall", "Test maps"), rows, note=note)


def _of_class(row: Record, key: str) -> str:
    """A score of a class, a dash if there is no map of it, which some records give as 0."""
    return with_interval(row[key], row.get(f"{key}_interval")) if row["support"] else "-"


def decision_table(models: Sequence[Record]) -> Table:
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


def offsets_table(models: Sequence[Record]) -> Table:
    """What the decision rule adds to each class's log probability."""
    names, rows = list(models[0]["test"]["per_class"]), []
    for model in models:
        rule = model["decision"]
        offsets = [o for label, o in enumerate(rule["offsets"]) if label not in rule.get("left_out", ())]
        offsets = offsets or [0.0] * len(names)  # a rule that leans to no class lists none
        rows.append([model["model_type"], *map("{:+.3f}".format, offsets)])
    return Table(("Offset", *names), rows)


def search_table(models: Sequence[Record]) -> Table:
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


def counts_table(record: Record) -> Table:
    parts = record["split"]["class_counts"]
    names = list(next(iter(parts.values())))
    rows = [[name, *(f"{parts[part][name]:,}" for part in parts)] for name in names]
    rows.append(["all", *(f"{sum(parts[part].values()):,}" for part in parts)])
    return Table(("Class", *(part.capitalize() for part in parts)), rows)


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

"""What is printed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from waferlab.reports.tables import format_number


def comparison_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The final table for the terminal; the best macro F1 in bold, what was not measured as a dash.

    Args:
        results: a dict for each model with model_type and any of accuracy, macro_f1, macro_f1_interval,
            n_parameters, train_seconds, latency_ms.
    """
    # Compact enough for 80 columns with the longest of our model names.
    table = Table(title="Model comparison", box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("Model", overflow="fold")
    for heading in ("Accuracy", "Macro F1\n[95% interval]", "Params", "Time\n(s)", "Latency\n(ms)"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    best = max((result["macro_f1"] for result in results if result.get("macro_f1") is not None), default=None)
    for result in results:
        macro_f1, interval = result.get("macro_f1"), result.get("macro_f1_interval")
        bounds = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        cells = [
            str(result["model_type"]),
            format_number(result.get("accuracy"), "{:.3f}"),
            format_number(macro_f1, "{:.3f}") + bounds,
            format_number(result.get("n_parameters"), "{:.3g}M", factor=1e-6),
            format_number(result.get("train_seconds"), "{:,.0f}"),
            format_number(result.get("latency_ms"), "{:,.2f}"),
        ]
        # Text, because rich would read brackets in a plain string, as in "resnet[small]", as markup.
        table.add_row(*map(Text, cells), style="bold" if best is not None and macro_f1 == best else None)
    return table


def comparison_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The same table as `comparison_table` in Markdown, for pages that render it."""
    headings = ("Model", "Accuracy", "Macro F1 [95% interval]", "Parameters", "Training (s)", "Latency (ms)")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for result in results:
        interval = result.get("macro_f1_interval")
        bounds = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        cells = [
            str(result["model_type"]),
            format_number(result.get("accuracy"), "{:.3f}"),
            format_number(result.get("macro_f1"), "{:.3f}") + bounds,
            format_number(result.get("n_parameters"), "{:,}"),
            format_number(result.get("train_seconds"), "{:,.0f}"),
            format_number(result.get("latency_ms"), "{:,.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Stopwatch:
    """Adds the seconds of a `with` block to a phase."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + time.monotonic() - self.started


def comparison_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each model that the comparison table and picture show."""
    return [
        {
            "model_type": r["model_type"],
            "accuracy": r["test"]["accuracy"],
            "macro_f1": r["test"]["macro_f1"],
            "macro_f1_interval": (r["test"]["intervals"] or {}).get("macro_f1"),
            "n_parameters": r["n_parameters"],
            "train_seconds": r["train_seconds"],
            "latency_ms": r["latency_ms"],
        }
        for r in results
    ]


def pipeline_verdict(results: Sequence[dict[str, Any]], best: str) -> str:
    """Two sentences: what was chosen and how good it is, and what the runner-up on validation reaches."""
    by_name = {r["model_type"]: r for r in results}

    def score(name: str) -> str:
        test = by_name[name]["test"]
        low, high = (test["intervals"] or {}).get("macro_f1") or (None, None)
        return f"{test['macro_f1']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    first = (
        f"{best} is best on validation and reaches macro F1 {score(best)} on {by_name[best]['test']['n_samples']:,} "
    )
    first += "test maps of lots it has never seen."
    others = sorted((n for n in by_name if n != best), key=lambda n: -by_name[n]["validation"]["macro_f1"])
    return f"{first} {others[0]}, next on validation, reaches {score(others[0])}." if others else first

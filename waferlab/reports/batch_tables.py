"""The tables that are printed after many maps were answered, from the summary that is written of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from waferlab.reports.tables import Table, format_number, with_interval


def class_table(summary: Mapping[str, Any]) -> Table:
    """How many maps each class was given, how surely, and how many somebody should look at."""
    rows = [
        [
            name,
            f"{row['count']:,}",
            f"{row['share']:.1%}",
            format_number(row["mean_confidence"], "{:.2f}"),
            format_number(row["abstained"], "{:,}"),
        ]
        for name, row in summary["classes"].items()
    ]
    return Table(("Class", "Maps", "Share", "Confidence", "Abstained"), rows)


def lot_table(summary: Mapping[str, Any]) -> Table:
    """The lots with the largest share of defects, and what is known of the rest."""
    lots = summary["by_lot"]
    rows = [
        [
            row["lot"],
            f"{row['maps']:,}",
            f"{row['defect_share']:.1%}",
            row["most_frequent"] or "-",
            format_number(row["abstained"], "{:,}"),
        ]
        for row in lots["listed"]
    ]
    rest, unknown = lots["rest"], lots["maps_of_unknown_lot"]
    parts = ["Lots with the largest share of defects first."]
    if rest["lots"]:
        share = format_number(rest["defect_share"], "{:.1%}")
        parts.append(f"{rest['lots']:,} other lots with {rest['maps']:,} maps: {share} defects.")
    if unknown:
        parts.append(f"{unknown:,} maps are of unknown lot.")
    return Table(("Lot", "Maps", "Defects", "Most frequent", "Abstained"), rows, note=" ".join(parts))


def report_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Scores with intervals as far as the labels go, of all maps and of each class."""
    report, sets = summary["report"], summary["report"]["sets"]
    rows = [
        [
            name,
            f"{row['support']:,}",
            format_number(row["precision"]),
            format_number(row["recall"]),
            with_interval(row["f1"], row["f1_interval"]),
            "-" if sets is None else _covered(sets["per_class"][name]),
        ]
        for name, row in report["per_class"].items()
    ]
    names = {"accuracy": "Accuracy", "macro_f1": "Macro F1", "balanced_accuracy": "Balanced accuracy"}
    scores = [[shown, with_interval(report[key], report["intervals"][key])] for key, shown in names.items()]
    note = f"{report['n_samples']:,} labelled maps. In brackets: {report['interval_method']}. {report['note']}"
    if sets is not None:
        note += f" Covered: how often the set holds the true class; promised is {sets['coverage']:.0%}"
        note += ", * where there were too few lots for a promise." if "*" in "".join(row[-1] for row in rows) else "."
    return [
        Table(("Score", "All labelled maps"), scores),
        Table(("Class", "Maps", "Precision", "Recall", "F1", "Covered"), rows, note=note),
    ]


def _covered(row: Mapping[str, Any]) -> str:
    return with_interval(row["covered"], row["interval"]) + ("" if row["promised"] else " *")

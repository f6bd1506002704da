"""Tables of what searches bring and cost, made by `readme_tables.py`."""

from __future__ import annotations

from pathlib import Path

from measure import rows


def search_pays(*records: dict) -> list[str]:
    """A row for each kind of case."""
    cells = []
    for row in (row for record in records for row in record["rows"]):
        searched = [n for n in row["trials"] if n]
        trials = f"{min(searched)} to {max(searched)}" if searched else "no search"
        maps = "generated" if row["data"] == "synthetic" else "real"
        maps += f", {row['training_maps']:,} to train on" if row.get("training_maps") else ""
        cells.append(
            [
                row["model"], maps, row["start"].replace("-", " "),
                f"{row['seconds']:g}", str(len(row["seeds"])), f"{row['without']:.3f}", f"{row['with']:.3f}",
                _difference(row["difference"]), trials,
                f"{sum(n or 0 for n in row['pruned'])} of {sum(searched)}" if searched else "-",
                f"{row['left_the_defaults']} of {len(row['seeds'])}",
            ]
        )  # fmt: skip
    return rows(
        "model, maps, learning rate, seconds, seeds, test F1 without, with a search, difference, trials, "
        "stopped early, left the defaults",
        cells,
    )


def busy_machine(record: dict) -> list[str]:
    """A row for each program, quiet and busy."""
    cells = [
        [row["what"], _seconds(row["quiet"]), _seconds(row["busy"]), _ratio(row["busy_over_quiet"])]
        for row in record["rows"]
    ]
    gains = [
        f"{model} {_ratio(gain['quiet'])} times on a quiet machine, {_ratio(gain['busy'])} beside the busy process"
        for model, gain in record["side_by_side_times_quicker"].items()
    ]
    table = rows("what, quiet (s), beside a busy process (s), times as long", cells)
    return [*table, "", f"Trials side by side are quicker than one after the other: {'; '.join(gains)}."]


def portfolio(record: dict) -> list[str]:
    """A row for each setting that was picked."""
    cells = []
    for model, picked in record["picked"].items():
        for number, setting in enumerate(picked):
            shown = ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in (setting["parameters"] or {}).items()
            )
            scores = " / ".join(f"{score:.3f}" for score in setting["scores"])
            cells.append([model, "the defaults" if number == 0 else f"{number}", scores, shown])
    kinds = sorted({Path(run["data"]).stem for run in record["runs"]})
    return rows(f"model, place, test F1 on {' / '.join(kinds)}, parameters", cells)


def _difference(difference: dict) -> str:
    if difference["interval"] is None:
        return f"{difference['mean']:+.3f}"
    low, high = difference["interval"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _ratio(ratio: dict) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _seconds(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)

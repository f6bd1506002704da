"""Tables of the campaigns in `benchmarks/faults/`, made by `readme_tables.py`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from measure import rows

Life = dict[str, Any]


def kills(record: dict) -> list[str]:
    """A row for each program that was killed."""
    cells = []
    for program, lives in _by(record, lambda life: life["program"]).items():
        again = [life["epochs_again"] / max(life["kills"], 1) for life in lives if life["epochs_again"] is not None]
        cells.append(
            [
                program, str(sum(life["kills"] for life in lives)), str(len(lives)),
                str(sum(life["kills"] > 1 for life in lives)), str(sum(life["group"] for life in lives)),
                f"{max(again):.1f}" if again else "-", _wrong(lives),
            ]
        )  # fmt: skip
    return rows(
        "program, kills, lives, killed more than once, whole process group, epochs trained again a kill at most, "
        "lives with a problem",
        cells,
    )


def writes(record: dict) -> list[str]:
    """A row for each program that died at its writes."""
    cells = [
        [program, str(len(lives)), str(len({life["place"] for life in lives})), _wrong(lives)]
        for program, lives in _by(record, lambda life: life["program"]).items()
    ]
    return rows("program, kills, distinct places, lives with a problem", cells)


def stops(record: dict) -> list[str]:
    """A row for each way to stop a program."""
    cells = []
    for way, lives in _by(record, lambda life: life["way"]).items():
        took = [life["seconds"] for life in lives if life["seconds"] is not None]
        stopped, longest = sum(life["at"] is not None for life in lives), f"{max(took):.1f}" if took else "-"
        cells.append([way, str(stopped), str(len({life["program"] for life in lives})), longest, _wrong(lives)])
    return rows("way, stops, programs, seconds to end at most, lives with a problem", cells)


def scarce(record: dict) -> list[str]:
    """A row for each thing that a program ran short of."""
    cells = []
    for kind, lives in _by(record, lambda life: life["kind"]).items():
        ended, programs = sum(life["status"] != 0 for life in lives), len({life["program"] for life in lives})
        cells.append([kind, str(len(lives)), str(programs), str(ended), _wrong(lives)])
    return rows("short of, lives, programs, ended by it, lives with a problem", cells)


def fuzz(record: dict) -> list[str]:
    """A row for each reader of strangers' bytes."""
    found: dict[str, list[int]] = {}
    for row in record["rows"]:
        inputs = found.setdefault(row["reader"], [0, 0])
        inputs[0] += row["inputs"]
        inputs[1] += row["found"]
    cells = [[reader, f"{inputs:,}", str(wrong)] for reader, (inputs, wrong) in found.items()]
    return [
        *rows("reader, inputs, inputs that went wrong", cells),
        "",
        f"{sum(inputs for inputs, _ in found.values()):,} inputs in all.",
    ]


def soak(record: dict) -> list[str]:
    """The first and the last tenth of the service and the search, and the list of versions."""
    cells = []
    for name, unit in (("service", "median_ms"), ("search", "seconds_a_trial"), ("registry", "seconds")):
        first, last = record[name][0], record[name][-1]
        steps = next(step for step in ("requests", "trials", "versions") if step in first)
        many = sum(row[steps] for row in record[name]) if steps == "requests" else last[steps]
        cells.append(
            [
                name, f"{many:,} {steps}", f"{first['memory_mib']} to {last['memory_mib']}",
                f"{first['files']} to {last['files']}", f"{first[unit]} to {last[unit]} {unit.replace('_', ' ')}",
            ]
        )  # fmt: skip
    return rows("what, how many, memory (MiB), open files, time", cells)


def _by(record: dict, key: Callable[[Life], Hashable]) -> dict[Any, list[Life]]:
    found: dict[Any, list[Life]] = {}
    for life in record["lives"]:
        found.setdefault(key(life), []).append(life)
    return found


def _wrong(lives: list[Life]) -> str:
    return str(sum(bool(life["problems"]) for life in lives))

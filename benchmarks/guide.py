"""What each chapter of the guide needs: seconds and memory, one after the other on a machine that does nothing else.

Measured: from the start of `python docs/guide/<chapter>.py` to its end, imports included, in an empty folder; and the
highest resident memory of any one of its processes. What is printed is thrown away; a chapter that fails stops the
measurement.

    python benchmarks/guide.py --output benchmarks/results/guide.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, write_record
from provenance import BATCHES, FAMILIES, GENERATOR, SCORES, SEARCH, SPLIT, TRAINING

MEASURES = (*GENERATOR, *SPLIT, *BATCHES, *TRAINING, *FAMILIES, *SEARCH, *SCORES)
CHAPTERS = sorted((ROOT / "docs/guide").glob("[0-9]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    turns = [{chapter.stem: needs(chapter) for chapter in CHAPTERS} for _ in range(arguments.repeats)]
    chapters = {name: [turn[name] for turn in turns] for name in turns[0]}
    write_record(
        arguments.output, {"benchmark": "guide", "chapters": chapters},
        measures=MEASURES, repeats="one turn" if arguments.repeats == 1 else f"{arguments.repeats} turns", weights=None,
        search=None,
    )  # fmt: skip


def needs(chapter: Path) -> dict[str, float]:
    """Seconds and megabytes of one chapter."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        started = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, chapter], cwd=folder, stdout=nowhere,
            env=os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{chapter.name} failed: run it alone to see why.")
    print(f"{chapter.stem}: {seconds:.0f} s, {used.ru_maxrss / 1024:,.0f} MB", flush=True)
    return {"seconds": round(seconds, 1), "memory_mb": round(used.ru_maxrss / 1024)}


def table_of_chapters(record: dict[str, Any]) -> list[str]:
    """A line for each chapter, with the title that it gives itself."""
    lines = ["| chapter | seconds | highest memory (MB) |", "|---|---|---|"]
    for name, turns in record["chapters"].items():
        title = (ROOT / "docs/guide" / f"{name}.py").read_text().splitlines()[1].removeprefix("# # ")
        seconds = statistics.median(turn["seconds"] for turn in turns)
        lines.append(f"| [{title}]({name}.py) | {seconds:.0f} | {max(turn['memory_mb'] for turn in turns):,} |")
    return lines


if __name__ == "__main__":
    main()

"""Writes the tables of measurements in README.md and benchmarks/README.md from the records in benchmarks/results/.

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`. With `--check` nothing is written: the exit status is 1
if a table does not say what the records say.

    python benchmarks/readme_tables.py
    python benchmarks/readme_tables.py --check
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from measure import ROOT
from time_to_f1 import table_of_levels, table_of_runs

RESULTS = ROOT / "benchmarks/results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks/README.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    arguments = parser.parse_args()
    old = {page: page.read_text() for page in PAGES}
    new = dict(old)
    for name, make in TABLES.items():
        fill(new, name, "\n".join(make(json.loads((RESULTS / f"{RECORD_OF.get(name, name)}.json").read_text()))))
    if arguments.check:
        return 0 if new == old else 1
    for page, text in new.items():
        page.write_text(text)
    return 0


def fill(pages: dict[Path, str], name: str, table: str) -> None:
    """Puts a table in its one place."""
    pattern, places = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", 0
    for page, text in pages.items():
        pages[page], found = re.subn(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.S)
        places += found
    if places != 1:
        raise SystemExit(f"The pages have {places} places for the table {name}, wanted 1.")


def rows(heading: str, cells: list[list[str]]) -> list[str]:
    """A Markdown table."""
    columns = heading.split(", ")
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in cells)]


def ratio_text(ratio: dict) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def throughput(record: dict) -> list[str]:
    return rows(
        "model, maps a second (ours), speed over a bare PyTorch loop",
        [
            [m["model_type"], f"{sorted(m['ours_maps_per_second'])[len(m['ours_maps_per_second']) // 2]:,.0f}",
             ratio_text(m["speed_over_bare_loop"])]
            for m in record["models"]
        ],
    )  # fmt: skip


def against(record: dict) -> list[str]:
    cells = [
        ["Ultralytics' trainer", "yolo_inspired", ratio_text(record["seconds_to_finish_theirs_over_ours"]),
         ratio_text(record["seconds_to_level_theirs_over_ours"]) + f" (F1 {record['level']:.2f})"]
    ]  # fmt: skip
    recipe = json.loads((RESULTS / "against_recipe.json").read_text())
    for model in recipe["models"]:
        for name in [name for name in model if name.startswith("recipe")]:
            finish, level = model[name]["seconds_to_finish_over_ours"], model[name]["seconds_to_level_over_ours"]
            cells.append(
                [f"Lightning {name}", model["model_type"], ratio_text(finish),
                 ratio_text(level) + f" (F1 {model['level']:.2f})"]
            )  # fmt: skip
    return rows("alternative, network, time to finish over ours, time to the same validation macro F1 over ours", cells)


def start_up(record: dict) -> list[str]:
    everything = record["seconds"] | record["quick_start"]
    return rows(
        "what, seconds (median), from, to",
        [[name, f"{v['median']:.2f}", f"{v['low']:.2f}", f"{v['high']:.2f}"] for name, v in everything.items()],
    )


def scale(record: dict) -> list[str]:
    return rows(
        "maps, generate (s), split (s), resize (s), train one epoch (s), highest memory (GB)",
        [
            [f"{r['maps']:,}", f"{r['generate']:.1f}", f"{r['split']:.1f}", f"{r['resize']:.1f}",
             f"{r['train_one_epoch']:.0f}", f"{r['peak_memory_gb']:.1f}"]
            for r in record["sizes"]
        ],
    )  # fmt: skip


def pruning(record: dict) -> list[str]:
    runs = record["runs"]
    cells = []
    for name, found in record["against_none"].items():
        low, high = found["best_value"]["interval"]
        best = {n: sum(run["best_macro_f1"] for run in runs[n]) / len(runs[n]) for n in (name, "none")}
        cells.append(
            [name, ratio_text(found["times_faster"]), ratio_text(found["times_fewer_epochs"]), f"{best[name]:.3f}",
             f"{best['none']:.3f}", f"{found['best_value']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"]
        )  # fmt: skip
    return rows("pruner, times faster, times fewer epochs, best value, best value without, difference", cells)


def comparison(record: dict) -> list[str]:
    from reporting import comparison_markdown

    return comparison_markdown(record).strip().splitlines()


def ablation(record: dict) -> list[str]:
    from reporting import ablation_markdown

    return ablation_markdown(record).strip().splitlines()


def pretraining(record: dict) -> list[str]:
    def mean_text(outcome: dict, way: str) -> str:
        return f"{outcome['mean'][way]:.3f} ± {outcome['deviation'][way]:.3f}"

    def cost_text(outcome: dict) -> str:
        header = next(h for h in record["weights"].values() if h["model_type"] == outcome["model_type"])
        return f"{int(header['maps_seen']):,} maps in {float(header['seconds']):,.0f} s"

    return rows(
        "model, seeds, pre-training, from scratch, pre-trained on generated maps, difference",
        [
            [o["model_type"], str(o["seeds"]), cost_text(o), *(mean_text(o, way) for way in o["mean"]),
             f"{o['difference']:+.3f} [{o['interval'][0]:+.3f}, {o['interval'][1]:+.3f}]"]
            for o in record["outcome"]
        ],
    )  # fmt: skip


TABLES: dict[str, Callable[..., list[str]]] = {
    "runs": table_of_runs,
    "levels": table_of_levels,
    "training_throughput": throughput,
    "against_ultralytics": against,
    "start_up": start_up,
    "scale": scale,
    "wafer_pretraining": pretraining,
    "pruning": pruning,
}
RECORD_OF = {"runs": "time_to_f1", "levels": "time_to_f1"}

if __name__ == "__main__":
    sys.exit(main())

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
import statistics
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
        "model, maps a second (ours), speed over a bare PyTorch loop, over one with PyTorch's own convolutions",
        [
            [m["model_type"], f"{statistics.median(m['ours_maps_per_second']):,.0f}",
             ratio_text(m["speed_over_bare_loop"]),
             ratio_text(m["speed_over_plain_loop"]) if "speed_over_plain_loop" in m else "the same"]
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
    cells = []
    for name, found in record["against_none"].items():
        runs = [run for run in record["runs"] if run["seed"] in found["seeds"]]
        scores = {n: [run["test_macro_f1"] for run in runs if run["pruner"] == n] for n in (name, "none")}
        cells.append(
            [name, str(len(found["seeds"])), ratio_text(found["times_faster"]), ratio_text(found["times_fewer_epochs"]),
             difference_text(found["best_macro_f1"]), *(f"{statistics.mean(some):.3f}" for some in scores.values()),
             difference_text(found["test_macro_f1"])]
        )  # fmt: skip
    return rows(
        "pruner, seeds, times faster, times fewer epochs, best validation F1: difference, test F1 with, without, "
        "difference",
        cells,
    )


def difference_text(difference: dict) -> str:
    low, high = difference["interval"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def score_text(score: float, interval: list[float]) -> str:
    return f"{score:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def quick_start(record: dict) -> list[str]:
    whole, tests = record["quick_start"]["quick_start, whole"], record["quick_start_test"]
    scores = sorted({score_text(test["macro_f1"], test["interval"]) for test in tests})
    return [
        f"`python quick_start.py` takes {whole['median']:.1f} s (median of {record['repeats']}, {whole['low']:.1f} to "
        f"{whole['high']:.1f}, {record['environment']['cpu_capability']}): test macro F1 {' or '.join(scores)} on "
        f"{tests[0]['maps']} generated test maps, seed 0."
    ]


def production(record: dict) -> list[str]:
    ranked = sorted(record["models"], key=lambda m: -m["validation"]["macro_f1"])
    return rows(
        "model, validation F1, test F1, its plain answers, accuracy, trials, epochs, training (s), latency (ms)",
        [
            [m["model_type"], f"{m['validation']['macro_f1']:.3f}",
             score_text(m["test"]["macro_f1"], m["test"]["intervals"]["macro_f1"]),
             f"{m['decision']['test_macro_f1_before']:.3f}", f"{m['test']['accuracy']:.3f}",
             str(len(m["search"]["trials"])), str(m["epochs"]), f"{m['train_seconds']:,.0f}", f"{m['latency_ms']:.1f}"]
            for m in ranked
        ],
    )  # fmt: skip


def champion(record: dict) -> list[str]:
    test = next(m for m in record["models"] if m["model_type"] == record["best_model"])["test"]
    return rows(
        "class, F1, precision, recall, test maps, most often taken for",
        [
            [name, score_text(c["f1"], c["f1_interval"]), f"{c['precision']:.3f}", f"{c['recall']:.3f}",
             f"{c['support']:,}", taken_for(name, list(test["per_class"]), counts)]
            for (name, c), counts in zip(test["per_class"].items(), test["confusion_matrix"], strict=True)
        ],
    )  # fmt: skip


def taken_for(name: str, names: list[str], counts: list[int]) -> str:
    """The two classes that maps of a class were most often called instead of their own."""
    wrong = sorted(((n, other) for n, other in zip(counts, names, strict=True) if n and other != name), reverse=True)
    return ", ".join(f"{other} ({n})" for n, other in wrong[:2]) or "-"


def comparison(record: dict) -> list[str]:
    from reporting import comparison_markdown

    return [*comparison_markdown(record).strip().splitlines(), "", record["verdict"]]


def comparison_models(record: dict) -> list[str]:
    """Without the table of differences, which the verdict sums up."""
    first, _, _ = "\n".join(comparison(record)).partition("\n| Models ")
    return [*first.strip().splitlines(), "", record["verdict"]]


def ablation(record: dict) -> list[str]:
    from reporting import ablation_markdown

    return [*ablation_markdown(record).strip().splitlines(), "", record["verdict"]]


def tracking_cost(record: dict) -> list[str]:
    share = record["study_share_of_search"]
    return rows(
        "search, wall time with MLflow over without, share of the search that the study takes",
        [[f"{record['model']}, {record['trials']} trials", ratio_text(record["wall_tracked_over_untracked"]),
          f"{share['median']:.1%} ({share['low']:.1%} to {share['high']:.1%})"]],
    )  # fmt: skip


def image_sizes(runs: list[dict]) -> list[str]:
    return rows(
        "pixels, validation F1, test F1, epochs, latency (ms)",
        [
            [str(r["image_size"]), f"{r['validation_macro_f1']:.3f}",
             score_text(r["test_macro_f1"], r["test_macro_f1_interval"]), str(r["epochs"]), f"{r['latency_ms']:.1f}"]
            for r in sorted(runs, key=lambda r: r["image_size"])
        ],
    )  # fmt: skip


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
    "production": production,
    "champion": champion,
    "comparison_generated": comparison_models,
    "comparison_real": comparison,
    "ablation": ablation,
    "runs": table_of_runs,
    "levels": table_of_levels,
    "training_throughput": throughput,
    "against_ultralytics": against,
    "start_up": start_up,
    "quick_start": quick_start,
    "image_sizes": image_sizes,
    "tracking_cost": tracking_cost,
    "scale": scale,
    "wafer_pretraining": pretraining,
    "pruning": pruning,
}
RECORD_OF = {"champion": "production", "quick_start": "start_up", "runs": "time_to_f1", "levels": "time_to_f1"}

if __name__ == "__main__":
    sys.exit(main())

"""Whether a search pays: with and without one, in the same seconds, everything counted.

Measured: macro F1 on the test part after `--seconds` of training in all, once with the default parameters for the whole
time and once with a search that is paid for from the same seconds; seed by seed, on the same split. A seed changes the
split, the weights and the proposals. With `--starts too-large too-small`, the defaults are those of the architecture
but for a learning rate that is ten times too large or too small, as a network that nobody has tuned would have; both
ways start from them, and there is no portfolio of its own. Left out of the clock: imports, reading the maps, scoring;
tracking is off. What is given besides the score: how long each really took, what the search chose, how many trials it
had and stopped.

    python benchmarks/search_pays.py --data wm811k.npz --seconds 600 --output benchmarks/results/search_pays.json

A call with the same output file adds to the record what it does not have yet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import earlier_runs, paired_difference, plain_config, write_record
from provenance import AFTER_SEARCH, BATCHES, FAMILY, GENERATOR, SCORES, SEARCH, SPLIT, TRAINING

MEASURES = (
    *GENERATOR,
    *SPLIT,
    *BATCHES,
    *TRAINING,
    *SEARCH,
    *AFTER_SEARCH,
    *SCORES,
)  # and the families that are trained

STARTS = {"defaults": 1.0, "too-large": 10.0, "too-small": 0.1}  # times the default learning rate
KEYS = ("data", "model", "start", "seconds", "seed", "way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["synthetic"], help="each is what --data of the scripts takes")
    parser.add_argument("--models", nargs="+", default=["lightning_cnn"])
    parser.add_argument("--starts", nargs="+", default=["defaults"], choices=STARTS)
    parser.add_argument("--seconds", type=float, nargs="+", default=[120.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the configuration")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    runs = earlier_runs(arguments.output, {})
    for case in cases(arguments):
        if any({key: run[key] for key in KEYS} == case | {"data": Path(case["data"]).name} for run in runs):
            continue
        runs.append(case | {"data": Path(case["data"]).name} | measure(case, arguments.set))
        print(json.dumps(runs[-1]), flush=True)
        write(arguments.output, runs)
    for row in compare(runs):
        print(json.dumps(row))


def cases(arguments: argparse.Namespace):
    """What is to be measured; both ways of a seed one after the other."""
    for seconds in arguments.seconds:
        for seed in arguments.seeds:
            for data in arguments.data:
                for model in arguments.models:
                    for start in arguments.starts:
                        for way in ("without", "with"):
                            yield dict(zip(KEYS, (data, model, start, seconds, seed, way), strict=True))


def measure(case: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """One training with or without a search, in an empty folder."""
    import yaml

    from integrated_pipeline import MODEL_REGISTRY, IntegratedMLPipeline

    model, factor = case["model"], STARTS[case["start"]]
    spec = MODEL_REGISTRY[model]
    with tempfile.TemporaryDirectory() as folder:
        more = {name: yaml.safe_load(value) for name, _, value in (field.partition("=") for field in fields)}
        config = plain_config(
            model_type=model, data=case["data"], seed=case["seed"], time_limit=case["seconds"], max_epochs=10_000,
            enable_optuna=case["way"] == "with", output_dir=folder, **more,
        )  # fmt: skip
        pipeline = IntegratedMLPipeline(config)
        pipeline.prepare_data()
        pipeline.data_module().setup()
        if factor != 1:
            usual = spec.parameters()["learning_rate"]
            MODEL_REGISTRY[model] = replace(
                spec, defaults={**spec.defaults, "learning_rate": usual * factor}, portfolio=None
            )
        started = time.monotonic()
        try:
            record = pipeline.search_and_train(model)
        finally:
            MODEL_REGISTRY[model] = spec
        seconds = time.monotonic() - started
        (result,), _ = pipeline.evaluate([record])
    search = record.search
    return {
        "macro_f1": round(result.test["macro_f1"], 4),
        "validation_macro_f1": round(result.validation["macro_f1"], 4),
        "took": round(seconds, 1),
        "training_maps": len(pipeline.split.train),
        "epochs": record.epochs,
        "precision": record.precision,
        "no_search_because": record.no_search_because if case["way"] == "with" else None,
        "search": None
        if search is None
        else {
            "seconds": round(search.seconds, 1), "trials": len(search.trials), "pruned": search.pruned,
            "proposed_by": search.proposed_by, "why": search.why, "workers": search.workers,
            "parameters": search.best.parameters,
        },
    }  # fmt: skip


def write(output: Path | None, runs: list[dict[str, Any]]) -> None:
    families = {name for run in runs for name in FAMILY.get(run["model"], ())}
    write_record(
        output,
        {"benchmark": "search_pays", "rows": compare(runs), "runs": runs},
        measures=(*MEASURES, *sorted(families)),
        repeats=f"{len({run['seed'] for run in runs})} seeds",
        precision=[run["precision"] for run in runs],
        search="as each row says",
    )


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With minus without, seed by seed, for each kind of case."""
    found: dict[tuple, dict[str, dict[int, dict]]] = {}
    for run in runs:
        kind = tuple(run[key] for key in ("data", "model", "start", "seconds"))
        found.setdefault(kind, {"with": {}, "without": {}})[run["way"]][run["seed"]] = run
    rows = []
    for (data, model, start, seconds), ways in found.items():
        seeds = sorted(ways["with"].keys() & ways["without"].keys())
        if not seeds:
            continue
        scores = {way: [ways[way][seed]["macro_f1"] for seed in seeds] for way in ways}
        searched = [ways["with"][seed]["search"] for seed in seeds]
        rows.append(
            {
                "data": data, "model": model, "start": start, "seconds": seconds, "seeds": seeds,
                "training_maps": max(ways["with"][seed].get("training_maps", 0) for seed in seeds) or None,
                "without": round(sum(scores["without"]) / len(seeds), 4),
                "with": round(sum(scores["with"]) / len(seeds), 4),
                "difference": paired_difference(scores["with"], scores["without"]),
                "searched": sum(one is not None for one in searched),
                "left_the_defaults": sum(
                    one is not None and "the defaults go on" not in one["why"] and "no trial beats" not in one["why"]
                    for one in searched
                ),
                "trials": [one and one["trials"] for one in searched],
                "pruned": [one and one["pruned"] for one in searched],
                "took": {way: round(max(ways[way][seed]["took"] for seed in seeds), 1) for way in ways},
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()

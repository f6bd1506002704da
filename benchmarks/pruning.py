"""What pruning saves a search, and what it costs in the network that is found.

Measured: seconds of a whole search with each pruner and with none, the best validation macro F1 it found, and what the
weights of its best trial score on all real maps of the test lots. The last is the fair one: the best of N noisy
validation scores flatters the search that finishes more trials. Maps, split, sampler, seed and number of trials are
the same, in turn; a seed changes the split, the proposals and the weights. Left out of the clock: imports, reading the
maps, scoring. Tracking is off. The first trials have the default parameters and those of the portfolio, TPE proposes
the others. A second call with the same output file adds its seeds or pruners to the record.

    python benchmarks/pruning.py --data wm811k.npz --output benchmarks/results/pruning.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from measure import (
    as_text,
    earlier_runs,
    few_maps,
    paired_difference,
    paired_ratio,
    plain_config,
    score_on,
    write_record,
)
from provenance import BATCHES, FAMILY, SCORES, SEARCH, SPLIT, TRAINING

if TYPE_CHECKING:
    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.config import ExperimentConfig

MEASURES = (*SPLIT, *BATCHES, *TRAINING, *SEARCH, *SCORES, "measure.few_maps")
SETTINGS = ("data", "per_class", "validation_per_class", "model", "trials", "epochs", "batch_size", "image_size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="real maps, anything that --data of the scripts takes")
    parser.add_argument("--per-class", type=int, default=80, help="training maps of each class")
    parser.add_argument("--validation-per-class", type=int, default=40)
    parser.add_argument("--model", default="torchvision_resnet")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10, help="of a trial that is not pruned")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--pruners", nargs="+", default=["auto"], help="each against none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    settings = {name: getattr(arguments, name) for name in SETTINGS} | {"data": Path(arguments.data).name}
    runs = earlier_runs(arguments.output, settings)
    for seed in arguments.seeds:
        pipeline = prepared(arguments, seed)
        for name in ["none", *arguments.pruners]:
            if any((run["pruner"], run["seed"]) == (name, seed) for run in runs):
                continue
            runs.append({"pruner": name, "seed": seed, **search(pipeline, arguments, name, seed)})
            print(json.dumps(runs[-1]), flush=True)
        names = sorted({run["pruner"] for run in runs} - {"none"})
        record = {"benchmark": "pruning", **settings, "runs": runs}
        record["against_none"] = {name: against_none(runs, name) for name in names}
        write_record(
            arguments.output,
            record,
            measures=(*MEASURES, *FAMILY.get(arguments.model, ())),
            repeats=f"{len({run['seed'] for run in runs})} seeds",
            precision=[str(pipeline.precision(arguments.model))],
            search=f"searches of {arguments.trials} trials",
        )
    for name in names:
        found = against_none(runs, name)
        print(f"{name}: {as_text(found['times_faster'])} times faster, test macro F1 {found['test_macro_f1']}")


def configuration(arguments: argparse.Namespace, pruner: str, seed: int, folder: str) -> ExperimentConfig:
    """What all searches of a call share."""
    return plain_config(
        model_type=arguments.model,
        data=arguments.data,
        enable_optuna=True,
        pruner=pruner,
        num_optuna_trials=arguments.trials,
        search_epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        seed=seed,
        output_dir=folder,
    )


def prepared(arguments: argparse.Namespace, seed: int) -> IntegratedMLPipeline:
    """A pipeline whose maps are read and split; its training and validation parts hold few maps of each class."""
    from integrated_pipeline import IntegratedMLPipeline

    pipeline = IntegratedMLPipeline(configuration(arguments, "none", seed, "."))
    pipeline.prepare_data()
    pipeline.split = few_maps(pipeline, arguments.per_class, arguments.validation_per_class, seed=seed)
    return pipeline


def search(source: IntegratedMLPipeline, arguments: argparse.Namespace, pruner: str, seed: int) -> dict:
    """One search in an empty folder."""
    from integrated_pipeline import IntegratedMLPipeline

    with tempfile.TemporaryDirectory() as folder:
        pipeline = IntegratedMLPipeline(configuration(arguments, pruner, seed, folder))
        pipeline.maps, pipeline.split = source.maps, source.split
        pipeline.data_module().setup()
        started = time.monotonic()
        found = pipeline.search(arguments.model)
        seconds = time.monotonic() - started
        tested = score_on(pipeline, found.best.record, pipeline.split.test)
    return {
        "seconds": round(seconds, 1),
        "best_macro_f1": round(found.best.macro_f1, 4),
        "test_macro_f1": round(tested["macro_f1"], 4),
        "test_macro_f1_odd_groups": tested["macro_f1_odd_groups"],
        "epochs": sum(trial.epochs for trial in found.trials),
        "pruned": sum(trial.state == "pruned" for trial in found.trials),
        "failed": sum(trial.state == "fail" for trial in found.trials),
    }


def against_none(runs: list[dict], name: str) -> dict:
    """Seed by seed: how many times faster, and how much better or worse what is found."""
    of = {pruner: {run["seed"]: run for run in runs if run["pruner"] == pruner} for pruner in ("none", name)}
    seeds = sorted(of["none"].keys() & of[name].keys())

    def column(pruner: str, key: str) -> list[float]:
        return [of[pruner][seed][key] for seed in seeds]

    return {
        "seeds": seeds,
        "times_faster": paired_ratio(column("none", "seconds"), column(name, "seconds")),
        "times_fewer_epochs": paired_ratio(column("none", "epochs"), column(name, "epochs")),
        "best_macro_f1": paired_difference(column(name, "best_macro_f1"), column("none", "best_macro_f1")),
        "test_macro_f1": paired_difference(column(name, "test_macro_f1"), column("none", "test_macro_f1")),
    }


if __name__ == "__main__":
    main()

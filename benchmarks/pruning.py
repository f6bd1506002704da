"""What pruning saves a search, and what it costs in the best value.

Measured: seconds of a whole search and the best validation macro F1 it found, with each pruner and with none: the same
maps, split, sampler, seed and number of trials, in turn, several seeds (a seed changes the split, the proposals and the
weights). Left out of the clock: imports, reading the maps. Tracking is off.

    python benchmarks/pruning.py --data wm811k.npz --output benchmarks/results/pruning.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from measure import as_text, paired_difference, paired_ratio, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="anything that --data of the scripts takes")
    parser.add_argument("--max-samples-per-class", type=int, default=200)
    parser.add_argument("--model", default="lightning_cnn")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10, help="of a trial that is not pruned")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--pruners", nargs="+", default=["median", "halving"], help="each against none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    runs: dict[str, list[dict]] = {name: [] for name in ["none", *arguments.pruners]}
    for seed in arguments.seeds:
        for name in runs:
            runs[name].append(search(arguments, name, seed))
            print(f"{name}, seed {seed}: {json.dumps(runs[name][-1])}", flush=True)
    record = {
        "benchmark": "pruning",
        **{k: v for k, v in vars(arguments).items() if k != "output"},
        "runs": runs,
        "against_none": {name: against_none(runs, name) for name in arguments.pruners},
    }
    for name, found in record["against_none"].items():
        print(f"{name}: {as_text(found['times_faster'])} times faster, best value {found['best_value']}")
    write_record(arguments.output, record)


def search(arguments: argparse.Namespace, pruner: str, seed: int) -> dict:
    """One search in an empty folder."""
    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

    with tempfile.TemporaryDirectory() as folder:
        config = ExperimentConfig(
            model_type=arguments.model,
            data=arguments.data,
            max_samples_per_class=None if arguments.data == "synthetic" else arguments.max_samples_per_class,
            use_pretrained=False,
            pruner=pruner,
            num_optuna_trials=arguments.trials,
            search_epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            image_size=arguments.image_size,
            seed=seed,
            enable_mlflow=False,
            output_dir=folder,
            quiet=True,
        )
        pipeline = IntegratedMLPipeline(config)
        pipeline.prepare_data()
        pipeline.data_module()
        started = time.monotonic()
        found = pipeline.search(arguments.model)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "best_macro_f1": round(found["best"]["macro_f1"], 4),
        "epochs": sum(trial["epochs"] for trial in found["trials"]),
        "pruned": sum(trial["state"] == "pruned" for trial in found["trials"]),
        "failed": sum(trial["state"] == "fail" for trial in found["trials"]),
    }


def against_none(runs: dict[str, list[dict]], name: str) -> dict:
    """Seed by seed: how many times faster, and how much better or worse the best value is."""
    column = {n: {key: [run[key] for run in some] for key in some[0]} for n, some in runs.items()}
    return {
        "times_faster": paired_ratio(column["none"]["seconds"], column[name]["seconds"]),
        "times_fewer_epochs": paired_ratio(column["none"]["epochs"], column[name]["epochs"]),
        "best_value": paired_difference(column[name]["best_macro_f1"], column["none"]["best_macro_f1"]),
    }


if __name__ == "__main__":
    main()

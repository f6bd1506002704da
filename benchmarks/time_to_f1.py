r"""Seconds from the start of a process to a given test macro F1 on real wafer maps.

Measured, for each model, training time and seed, in a process of its own: the macro F1 on test lots that nothing
before has seen. The clock starts with the process and stops with the training: imports, reading and resizing the maps,
validation after each epoch and checkpoints are in it; the final evaluation is not. Weights are random at the start. A
seed changes the split, the weights and the batches. The learning rate is annealed to end with the time, so each time
is a training of its own: a score is reached in the shortest time whose mean over the seeds is at least that score.

    python benchmarks/time_to_f1.py --data wm811k.npz --models lightning_cnn --minutes 2 5 --seeds 0 1 2 \
        --output benchmarks/results/time_to_f1.json
    python benchmarks/time_to_f1.py --tables benchmarks/results/time_to_f1.json

Runs that are in the output already, made by today's code, are not done again. The same command uses a GPU where there
is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import NOT_RECORDED, interval_holds, odd_groups_macro_f1, plain_config, rows, score_text
from provenance import BATCHES, FAMILY, ROOT, SCORES, SPLIT, TORCHVISION, TRAINING, changed, digests

MEASURES = (*SPLIT, *BATCHES, *TRAINING, *SCORES)
LEVELS = (0.80, 0.85, 0.88, 0.90, 0.91)
SMALL_STEM = "resnet18_small_stem"  # not among the project's models: it is here to stand beside its ResNet18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="labelled maps, anything that --data of the scripts takes")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["all"],
        help=f"model types, or {SMALL_STEM} (default: the four families)",
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=[10], help="of training (default 10)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=32, help="maps a training batch (default 32)")
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--tune-decision", action="store_true", help="also score the decision chosen on validation")
    parser.add_argument("--work-dir", default=ROOT / "results/time_to_f1", help="for checkpoints and pictures")
    parser.add_argument("--output", type=Path, help="JSON to which the runs are added")
    parser.add_argument("--tables", type=Path, metavar="JSON", help="print the tables of finished runs and stop")
    parser.add_argument("--picture", type=Path, help="with --tables: draw the longest runs of each model (PNG)")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "MINUTES", "SEED", "STARTED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        model_type, minutes, seed, started = arguments.one
        print(json.dumps(measure(arguments, model_type, float(minutes), int(seed), float(started))))
    elif arguments.tables:
        runs = json.loads(arguments.tables.read_text())
        print("\n".join([*table_of_runs(runs), "", *table_of_levels(runs)]))
        if arguments.picture:
            draw(runs, arguments.picture)
    else:
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    runs = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else []
    models = arguments.models
    if models == ["all"]:
        models = plain_config(model_type="all").model_types()
    settings = {"image_size": arguments.image_size, "batch_size": arguments.batch_size}
    for minutes in arguments.minutes:
        for seed in arguments.seeds:
            for model_type in models:
                key = {"model_type": model_type, "minutes": minutes, "seed": seed, **settings}
                before = [run for run in runs if all(run[k] == v for k, v in key.items())]
                if any(not changed(run["code"]) for run in before):
                    print(f"done before: {key}")
                    continue
                run = key | in_own_process(arguments, model_type, minutes, seed)
                print(f"{key}: {run['seconds']:.0f} s, test macro F1 {run['test_macro_f1']:.3f}", flush=True)
                runs = [*(other for other in runs if other not in before), run]  # in place of what older code measured
                if arguments.output:
                    arguments.output.write_text(json.dumps(runs, indent=1) + "\n")
    print("\n".join([*table_of_runs(runs), "", *table_of_levels(runs)]))


def in_own_process(arguments: argparse.Namespace, model_type: str, minutes: float, seed: int) -> dict:
    flags = [f"--data={arguments.data}", f"--batch-size={arguments.batch_size}", f"--work-dir={arguments.work_dir}"]
    flags += [f"--image-size={arguments.image_size}", *(["--tune-decision"] if arguments.tune_decision else [])]
    one = ["--one", model_type, str(minutes), str(seed), str(time.time())]
    done = subprocess.run([sys.executable, __file__, *flags, *one], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, model_type: str, minutes: float, seed: int, started: float) -> dict:
    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.records import environment

    if model_type == SMALL_STEM:
        register_small_stem()
    config = plain_config(
        experiment_name=f"{model_type}_{minutes:g}min_seed{seed}",
        model_type=model_type,
        data=arguments.data,
        max_epochs=1000,
        time_limit=60 * minutes,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        seed=seed,
        output_dir=arguments.work_dir,
    )
    pipeline = IntegratedMLPipeline(config)
    pipeline.prepare_data()
    record = pipeline.train_final_model(model_type)
    seconds = time.time() - started
    (result,), (predicted,) = pipeline.evaluate([record])
    tuned = None
    if arguments.tune_decision:
        config.tune_decision = True
        started = time.time()
        (decided,), _ = pipeline.evaluate([record])
        more_seconds = time.time() - started  # the scoring of the test part is in it too
        tuned = {
            "seconds": round(seconds + more_seconds, 1),
            "test_macro_f1": round(decided.test["macro_f1"], 4),
            "validation_macro_f1": round(decided.validation["macro_f1"], 4),
            "per_class_f1": {name: round(row["f1"], 3) for name, row in decided.test["per_class"].items()},
            **{key: decided.decision[key] for key in ("views", "prior_strength", "temperature")},
        }
    test = result.test
    return {
        "seconds": round(seconds, 1),
        "train_seconds": round(record.train_seconds, 1),
        "test_macro_f1": round(test["macro_f1"], 4),
        "test_macro_f1_interval": [round(v, 4) for v in test["intervals"]["macro_f1"]],
        "interval_method": test["interval_method"],
        "test_macro_f1_odd_groups": odd_groups_macro_f1(pipeline, predicted, pipeline.split.test),
        "test_accuracy": round(test["accuracy"], 4),
        "decision": tuned,
        "validation_macro_f1": round(result.validation["macro_f1"], 4),
        "per_class_f1": {name: round(row["f1"], 3) for name, row in test["per_class"].items()},
        "validation_history": [round(v, 4) for v in record.history["val_macro_f1"]],
        "epochs": record.epochs,
        "best_epoch": record.best_epoch,
        "n_parameters": record.n_parameters,
        "latency_ms": round(result.latency_ms, 2),
        "weights": str(record.weights),
        "precision": record.precision,
        "maps": {part: len(indices) for part, indices in pipeline.split.parts().items()},
        "split": pipeline.split.fingerprint,
        "environment": environment(),
        "code": digests((*MEASURES, *FAMILY.get(model_type, TORCHVISION))),
    }


def register_small_stem() -> None:
    """ResNet18 with the first layer that is customary for images of 32 pixels, and ResNet18's defaults."""
    from dataclasses import replace

    from integrated_pipeline import find_model, register_model

    resnet = find_model("torchvision_resnet")
    register_model(SMALL_STEM, replace(resnet, fixed={**resnet.fixed, "small_stem": True}, portfolio=(), in_all=False))


def longest(runs: list[dict]) -> list[dict]:
    """Of each model the first seed of its longest training."""
    found: dict[str, dict] = {}
    for run in sorted(runs, key=lambda run: (run["minutes"], -run["seed"])):
        found[run["model_type"]] = run
    return list(found.values())


def draw(runs: list[dict], path: Path) -> None:
    """The models beside each other."""
    from waferlab.reports.run_figures import plot_model_comparison

    results = [
        {
            "model_type": run["model_type"],
            "accuracy": run["test_accuracy"],
            "macro_f1": run["test_macro_f1"],
            "macro_f1_interval": run["test_macro_f1_interval"] if interval_holds(run.get("interval_method")) else None,
            "n_parameters": run["n_parameters"],
            "train_seconds": run["train_seconds"],
            "latency_ms": run["latency_ms"],
        }
        for run in longest(runs)
    ]
    plot_model_comparison(results, path=path, title="Real wafer maps: the longest training of each model")


def table_of_runs(runs: list[dict]) -> list[str]:
    """Markdown: one line for each machine, model, training time, image size and batch size.

    The bracket of one seed is its interval over lots, where today's method made it.
    """
    heading = "machine, model, minutes, pixels, batch, seeds, test macro F1, of odd groups, decision tuned, accuracy, "
    heading += "epochs, parameters"
    cells = []
    for (machine, model_type, minutes, pixels, batch), some in grouped(runs).items():
        tuned = [run["decision"]["test_macro_f1"] for run in some if run.get("decision")]
        odd = [run["test_macro_f1_odd_groups"] for run in some if run.get("test_macro_f1_odd_groups") is not None]
        epochs = [run["epochs"] for run in some]
        cells.append([
            machine, model_type, f"{minutes:g}", str(pixels), str(batch), str(len(some)), score_of_seeds(some),
            mean_and_deviation(odd) if len(odd) == len(some) else NOT_RECORDED,
            mean_and_deviation(tuned) if len(tuned) == len(some) else "-",
            f"{statistics.mean(run['test_accuracy'] for run in some):.3f}",
            "-".join(str(e) for e in sorted({min(epochs), max(epochs)})),
            f"{some[0]['n_parameters']:,}",
        ])  # fmt: skip
    return rows(heading, cells)


def score_of_seeds(runs: list[dict]) -> str:
    if len(runs) == 1:
        return score_text(runs[0]["test_macro_f1"], runs[0]["test_macro_f1_interval"], runs[0].get("interval_method"))
    return mean_and_deviation([run["test_macro_f1"] for run in runs])


def mean_and_deviation(scores: list[float]) -> str:
    deviation = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{deviation}"


def table_of_levels(runs: list[dict]) -> list[str]:
    """Markdown: for each machine and model, seconds from the start of the process to each score, where reached."""
    groups, cells = grouped(runs), []
    for row in dict.fromkeys((machine, model_type) for machine, model_type, *_ in groups):
        some = [group for key, group in groups.items() if key[:2] == row]
        cells.append([*row, *(seconds_to(level, some) for level in LEVELS)])
    return rows(f"machine, model, {', '.join(f'{level:.2f}' for level in LEVELS)}", cells)


def seconds_to(level: float, groups: list[list[dict]]) -> str:
    reached = [g for g in groups if statistics.mean(run["test_macro_f1"] for run in g) >= level]
    if not reached:
        return "not reached"
    soonest = min(reached, key=lambda group: statistics.mean(run["seconds"] for run in group))
    return f"{statistics.mean(run['seconds'] for run in soonest):.0f} s (n={len(soonest)})"


def grouped(runs: list[dict]) -> dict[tuple[str, str, float, int, int], list[dict]]:
    """Runs by machine, model, minutes, image size and batch size."""
    groups: dict[tuple[str, str, float, int, int], list[dict]] = {}
    for run in sorted(runs, key=lambda run: (machine_of(run), run["minutes"])):
        key = (machine_of(run), *(run[name] for name in ("model_type", "minutes", "image_size", "batch_size")))
        groups.setdefault(key, []).append(run)
    return groups


def machine_of(run: dict) -> str:
    made = run["environment"]
    return f"{made['cpu_capability']}, {made['torch_threads']} threads on {made['cpu_cores']} cores, {run['precision']}"


if __name__ == "__main__":
    main()

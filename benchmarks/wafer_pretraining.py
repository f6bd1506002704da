r"""What pre-training on generated wafer maps brings where few real maps are labelled.

Measured, for each model and seed: the macro F1 on all real test lots of a network that was fine-tuned from weights
made by `pretrain`, against the same network trained from random weights. Both see the same few real maps of each
class for the same number of epochs, and have the same seed. The lots are split first; the few training maps come from
the training lots, and the few validation maps, which pick the best epoch, from the validation lots. A seed changes the
split, the few maps, the initial weights and the batches; the pre-trained weights are the same for all seeds. The
interval of the mean difference is Student's t over the seeds, 95%.

    python run_experiment.py --mode pretrain
    python benchmarks/wafer_pretraining.py --data wm811k.npz --models lightning_cnn --seeds 0 1 2 \
        --output benchmarks/results/wafer_pretraining.json

Learning rates and epochs are chosen with other seeds and `--score validation`, which scores on all maps of the
validation lots and leaves the test lots closed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from measure import few_maps, plain_config, score_on, write_record
from provenance import BATCHES, FAMILY, GENERATED_WEIGHTS, GENERATOR, ROOT, SCORES, SPLIT, TRAINING

MEASURES = (
    *(*SPLIT, *BATCHES, *TRAINING, *SCORES, *GENERATOR, *GENERATED_WEIGHTS),
    "measure.few_maps",
)
WAYS = {"from scratch": False, "pre-trained on generated maps": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="real maps, anything that --data of the scripts takes")
    parser.add_argument("--models", nargs="+", default=["lightning_cnn"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=50, help="real training maps of each class")
    parser.add_argument("--validation-per-class", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, help="for both ways, in place of each one's default")
    parser.add_argument("--score", choices=("test", "validation"), default="test", help="lots to score on")
    parser.add_argument("--pretrained-dir", type=Path, default=ROOT / "checkpoints/pretrained")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs = []
    for model_type in arguments.models:
        for seed in arguments.seeds:
            runs += compare(arguments, model_type, seed)
    settings = ("models", "seeds", "per_class", "validation_per_class", "epochs", "batch_size", "image_size", "score")
    record = {
        "benchmark": "wafer_pretraining",
        **{name: getattr(arguments, name) for name in settings},
        "weights": headers(arguments.pretrained_dir, runs),
        "outcome": [summarise(name, [run for run in runs if run["model_type"] == name]) for name in arguments.models],
        "runs": runs,
    }
    write_record(
        arguments.output,
        record,
        measures=(*MEASURES, *(name for model in arguments.models for name in FAMILY.get(model, ()))),
        repeats=f"{len(arguments.seeds)} seeds",
        precision=[run["precision"] for run in runs],
        weights="weights as the columns say",
    )


def headers(folder: Path, runs: list[dict]) -> dict[str, dict]:
    """What the files that were fine-tuned from say of their pre-training."""
    from waferlab.models.starting_weights import read_header

    names = {run["weights"] for run in runs if not run["weights"].startswith("random")}
    files = [folder / name[name.index("(") + 1 : -1] for name in sorted(names)]
    return {file.name: dict(sorted(read_header(file).items())) for file in files}


def compare(arguments: argparse.Namespace, model_type: str, seed: int) -> list[dict]:
    """Both ways on the same maps."""
    from integrated_pipeline import IntegratedMLPipeline

    runs, prepared = [], None
    for way, pretrained in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = plain_config(
                model_type=model_type,
                data=arguments.data,
                use_pretrained=pretrained,
                pretrained_source="wafer",
                pretrained_dir=arguments.pretrained_dir,
                max_epochs=arguments.epochs,  # all of them, so that both train for the same number
                batch_size=arguments.batch_size,
                image_size=arguments.image_size,
                learning_rate=arguments.learning_rate,
                seed=seed,
                output_dir=folder,
            )
            pipeline = IntegratedMLPipeline(config)
            if prepared is None:
                pipeline.prepare_data()
                prepared = pipeline
                few = few_maps(prepared, arguments.per_class, arguments.validation_per_class, seed=seed)
                scored = getattr(prepared.split, arguments.score)
            pipeline.maps, pipeline.split = prepared.maps, few
            record = pipeline.train_final_model(model_type)
            if pretrained and record.weights.kind == "random":
                raise SystemExit(f"{model_type}: {record.weights}")
            score = score_on(pipeline, record, scored)
        runs.append(
            {
                "model_type": model_type,
                "seed": seed,
                "way": way,
                "macro_f1": round(score["macro_f1"], 4),
                "macro_f1_odd_groups": score["macro_f1_odd_groups"],
                "accuracy": round(score["accuracy"], 4),
                "per_class_f1": {name: round(row["f1"], 3) for name, row in score["per_class"].items()},
                "best_epoch": record.best_epoch,
                "epochs": record.epochs,
                "train_seconds": round(record.train_seconds, 1),
                "learning_rate": record.parameters["learning_rate"],
                "weights": str(record.weights),
                "precision": record.precision,
                "maps": {"train": len(few.train), "validation": len(few.validation), "scored": len(scored)},
            }
        )
        print(f"{model_type}, seed {seed}, {way}: macro F1 {score['macro_f1']:.3f}", flush=True)
    return runs


def summarise(model_type: str, runs: list[dict]) -> dict:
    """Mean and standard deviation of each way, and the mean difference, paired by seed, with its interval."""
    from scipy.stats import t

    scores = {way: [run["macro_f1"] for run in runs if run["way"] == way] for way in WAYS}
    differences = [after - before for before, after in zip(*scores.values(), strict=True)]
    n, mean = len(differences), statistics.mean(differences)
    half = None
    if n > 1:
        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return {
        "model_type": model_type,
        "seeds": n,
        "mean": {way: round(statistics.mean(values), 4) for way, values in scores.items()},
        "deviation": {way: round(statistics.stdev(values), 4) if n > 1 else None for way, values in scores.items()},
        "difference": round(mean, 4),
        "interval": None if half is None else [round(mean - half, 4), round(mean + half, 4)],
    }


if __name__ == "__main__":
    main()

"""What each model reaches on real wafer maps in a given training time.

Measured: macro F1 and accuracy on test lots that nothing else has seen, after `--minutes` of training from random or
pre-trained weights (the record says which), with 95% bootstrap intervals over lots; once for plain predictions and
once for the mean over the eight symmetries. The clock covers training and the validation after each epoch; reading the
file, resizing the maps, the final evaluation and the imports are left out.

    python benchmarks/real_maps.py --data wm811k.npz --minutes 10 --output benchmarks/results/real_maps.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled maps, anything that --data of the scripts takes")
    parser.add_argument("--models", nargs="+", default=["all"], help="model types (default: the four families)")
    parser.add_argument("--minutes", type=float, default=10, help="of training, for each model (default 10)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", default="results/real_maps", help="for checkpoints and pictures")
    parser.add_argument("--output", type=Path, help="JSON to which the records are added")
    arguments = parser.parse_args()

    from integrated_pipeline import ExperimentConfig

    config = ExperimentConfig(
        model_type="all" if arguments.models == ["all"] else arguments.models,
        data=arguments.data,
        max_epochs=1000,
        early_stopping_patience=1000,
        time_limit=60 * arguments.minutes,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        seed=arguments.seed,
        enable_optuna=False,
        enable_mlflow=False,
        output_dir=arguments.work_dir,
    )
    for model_type in config.model_types():
        record = measure(replace(config, model_type=model_type, experiment_name=model_type))
        print(json.dumps({k: v for k, v in record.items() if k not in ("environment", "per_class_f1")}, indent=1))
        if arguments.output:
            records = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
            arguments.output.write_text(json.dumps([*records, record], indent=1) + "\n")


def measure(config) -> dict:
    """Trains one model and scores it plainly and by eight views."""
    from integrated_pipeline import IntegratedMLPipeline

    plain = IntegratedMLPipeline(config).run_complete_pipeline()
    # Resuming a finished run trains nothing: it scores the same checkpoint anew.
    again = replace(config, resume=True, eight_views=True, quiet=True, experiment_name=config.experiment_name)
    views = IntegratedMLPipeline(again).run_complete_pipeline()
    model, by_views = plain["models"][0], views["models"][0]
    return {
        "model_type": model["model_type"],
        "test_macro_f1": model["test"]["macro_f1"],
        "test_macro_f1_interval": model["test"]["intervals"]["macro_f1"],
        "test_accuracy": model["test"]["accuracy"],
        "validation_macro_f1": model["validation"]["macro_f1"],
        "eight_views_test_macro_f1": by_views["test"]["macro_f1"],
        "eight_views_test_macro_f1_interval": by_views["test"]["intervals"]["macro_f1"],
        "eight_views_validation_macro_f1": by_views["validation"]["macro_f1"],
        "per_class_f1": {name: row["f1"] for name, row in model["test"]["per_class"].items()},
        "epochs": model["epochs"],
        "best_epoch": model["best_epoch"],
        "train_seconds": model["train_seconds"],
        "n_parameters": model["n_parameters"],
        "latency_ms": model["latency_ms"],
        "weights": model["weights"],
        "precision": model["precision"],
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "maps": plain["data"]["maps"],
        "split_fingerprint": plain["split"]["fingerprint"],
        "environment": plain["environment"],
    }


if __name__ == "__main__":
    main()

r"""Makes a record of what run_experiment.py wrote: with the digests of the code at its commit, without folders.

With `--data`, the trained models of a production run are also scored on the test maps of odd groups (see
`measure.odd_groups_macro_f1`): the run's checkpoints must still lie where it left them.

    python run_experiment.py --mode production --data wm811k.npz
    python benchmarks/keep_experiment.py --data wm811k.npz results/production/experiment_summary.json \
        benchmarks/results/production.json
    python benchmarks/keep_experiment.py results/comparison/comparison.json benchmarks/results/comparison_real.json
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from measure import odd_groups_macro_f1
from provenance import EXPERIMENTS, digests

FOLDERS = re.compile(r"(?<![\w.:/#])/(?:[\w.+-]+/)+")  # of a machine, in commands and reasons
PLACES = ("output_dir", "resume", "quiet", "pretrained_dir", "tracking_uri", "storage")  # of no use to a reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, help="what run_experiment.py wrote")
    parser.add_argument("record", type=Path, help="the JSON to write")
    parser.add_argument("--data", help="of a production run on real maps: the same maps")
    arguments = parser.parse_args()
    summary = json.loads(arguments.summary.read_text())
    made = summary["environment"]
    if made.get("commit") is None or made["uncommitted_changes"]:
        raise SystemExit(f"{arguments.summary}: no commit holds its code. Commit all changes and run it anew.")
    code = digests(EXPERIMENTS[summary["mode"]], at=made["commit"])
    if arguments.data:
        score_odd_groups(summary, arguments.data)
    config = {key: value for key, value in summary["config"].items() if key not in PLACES}
    config["data"] = Path(str(config["data"])).name
    record = json.dumps(summary | {"config": config, "code": code}, indent=1) + "\n"
    arguments.record.write_text(FOLDERS.sub("", record))
    print(f"written to {arguments.record}")


def score_odd_groups(summary: dict[str, Any], data: str) -> None:
    """Adds `test_macro_f1_odd_groups` to each model."""
    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.config import ExperimentConfig
    from waferlab.records import TrainingRecord

    known = {field.name for field in fields(ExperimentConfig)}
    settings = {key: value for key, value in summary["config"].items() if key in known}
    settings |= {"data": data, "enable_mlflow": False, "quiet": True}
    pipeline = IntegratedMLPipeline(ExperimentConfig(**settings))
    pipeline.prepare_data()
    results, predictions = pipeline.evaluate([TrainingRecord.from_json(model) for model in summary["models"]])
    for model, result, predicted in zip(summary["models"], results, predictions, strict=True):
        then, now = model["test"]["macro_f1"], result.test["macro_f1"]
        if abs(then - now) > 1e-3:
            raise SystemExit(f"{model['model_type']}: its checkpoint scores {now:.4f} now, {then:.4f} in the summary.")
        model["test_macro_f1_odd_groups"] = odd_groups_macro_f1(pipeline, predicted, pipeline.split.test)


if __name__ == "__main__":
    main()

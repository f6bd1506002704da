"""Estimates how far the labels of real maps are right, and draws those that are likeliest wrong; it changes none.

Measured: by confident learning (`waferlab/evaluation/label_audit.py`, with cleanlab, the extra `audit`), the share of
wrong labels of each class and of all maps, with intervals over lots, and the macro F1 that a classifier which is always
right would have against such labels. The lots are dealt into folds, copies of a map into one; the pipeline trains on
the other folds, of which it keeps a part for validation, and answers the maps of each fold with the decision that it
chooses there. So each map is answered once, by a network that has seen neither it nor its lot.

What this cannot tell apart: a wrong label, and a map that networks of this kind surely take for something else. The
sheet of wafers is there for people to look at.

Each fold's answers lie in a file of the folder as soon as they are known, so that a second call goes on.

    pip install '.[audit]'
    python benchmarks/label_audit.py --data wm811k.npz --output benchmarks/results/label_audit.json \
        --picture docs/label_audit.png
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measure import plain_config, rows, write_record
from provenance import BATCHES, CNN, DECISION, SPLIT, TRAINING, digests

if TYPE_CHECKING:
    from waferlab.config import ExperimentConfig
    from waferlab.data.maps import WaferMaps
    from waferlab.data.splitting import Split
    from waferlab.evaluation.predictions import Predictions

ANSWERS = ("split_into_folds", "probabilities_by_views", *SPLIT, *BATCHES, *TRAINING, *CNN, *DECISION)
MEASURES = (*ANSWERS, "audit_labels", "estimated_joint", "likeliest_wrong")
MODEL = "lightning_cnn"


def answers_of_fold(config: ExperimentConfig, maps: WaferMaps, split: Split, file: Path) -> dict[str, Any]:
    """Probabilities of a fold's maps, and about their network; from the file where it has those of this training."""
    from waferlab.data.maps import CLASS_NAMES
    from waferlab.errors import DataError
    from waferlab.tracking.whole_files import write_atomically

    # The fold's maps are in its fingerprint, whatever file they came from.
    settings = {"split": split.fingerprint, "epochs": config.max_epochs, "batch": config.batch_size}
    settings |= {"pixels": config.image_size, "seed": config.seed, "code": digests(ANSWERS)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if file.exists():
        with np.load(file, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return {"probabilities": kept["probabilities"], **json.loads(str(kept["about"]))}
    lacking = sorted({*maps.labels} - {*maps.labels[split.train]})
    if lacking:
        raise DataError(
            f"{CLASS_NAMES[lacking[0]]} comes from so few lots that a fold trains without it. Add maps of it from "
            "other lots, or leave the class out of the data."
        )
    trained = train_and_answer(config, maps, split)
    buffer, about = io.BytesIO(), {name: trained[name] for name in ("macro_f1", "epochs", "precision", "seconds")}
    np.savez(buffer, key=np.array(key), probabilities=trained["probabilities"], about=np.array(json.dumps(about)))
    write_atomically(file, buffer.getvalue())
    return trained


def train_and_answer(config: ExperimentConfig, maps: WaferMaps, split: Split) -> dict[str, Any]:
    from integrated_pipeline import IntegratedMLPipeline

    pipeline = IntegratedMLPipeline(config)
    pipeline.prepare_data(maps, split)
    (result,), (predicted,) = pipeline.evaluate([pipeline.train_final_model(MODEL)])
    return {
        "probabilities": predicted.probabilities,
        "macro_f1": round(result.test["macro_f1"], 4),
        "epochs": result.epochs,
        "precision": str(result.precision),
        "seconds": round(result.train_seconds, 1),
    }


def answer_all(arguments: argparse.Namespace, maps: WaferMaps) -> tuple[Predictions, list[dict[str, Any]]]:
    """Answers of all maps, each by a network of other lots, and what is known of each fold."""
    from waferlab.data.maps import CLASS_NAMES
    from waferlab.data.splitting import split_into_folds
    from waferlab.evaluation.predictions import Predictions

    classes = np.flatnonzero(maps.class_counts)
    probabilities, folds = np.zeros((len(maps), len(classes))), []
    for number, split in enumerate(split_into_folds(maps, folds=arguments.folds, seed=arguments.seed)):
        config = plain_config(
            experiment_name=f"fold_{number}", model_type=MODEL, data=arguments.data, max_epochs=arguments.epochs,
            batch_size=arguments.batch_size, image_size=arguments.image_size, seed=arguments.seed, tune_decision=True,
            output_dir=str(arguments.folder),
        )  # fmt: skip
        fold = answers_of_fold(config, maps, split, arguments.folder / f"answers_{number}.npz")
        probabilities[split.test] = fold.pop("probabilities")
        folds.append({"maps": len(split.test), "lots": len(np.unique(maps.groups[split.test])), **fold})
        print(f"fold {number + 1} of {arguments.folds}: macro F1 {fold['macro_f1']:.3f}", flush=True)
    names = tuple(np.array(CLASS_NAMES)[classes])
    return Predictions(probabilities, np.searchsorted(classes, maps.labels), maps.groups, names), folds


def about(answers: Predictions, index: int) -> dict[str, Any]:
    """Of a map whose label is probably wrong: where it is, its class, and what networks give it."""
    called = int(answers.predicted[index])
    return {
        "map": int(index),  # its place in the data as they are read
        "lot": int(answers.groups[index]),
        "given": answers.class_names[answers.labels[index]],
        "called": answers.class_names[called],
        "probability": round(float(answers.probabilities[index, called]), 4),
    }


def run_audit(arguments: argparse.Namespace) -> None:
    from waferlab.data.reading import load_wafer_maps
    from waferlab.evaluation.label_audit import audit_labels, check_that_cleanlab_is_there, likeliest_wrong
    from waferlab.reports.audit_figures import plot_suspects

    check_that_cleanlab_is_there()  # before the trainings, not after them
    maps = load_wafer_maps(arguments.data, seed=arguments.seed)
    answers, folds = answer_all(arguments, maps)
    wrong = likeliest_wrong(answers)
    suspects = [about(answers, index) for index in wrong[: arguments.most]]
    if arguments.picture and suspects:
        captions = [(one["given"], one["called"], one["probability"]) for one in suspects]
        plot_suspects([maps[one["map"]] for one in suspects], captions, path=arguments.picture)
    named = {name: getattr(arguments, name) for name in ("data", "epochs", "batch_size", "image_size", "seed")}
    record = {"benchmark": "label_audit", "model_type": MODEL, **named, "folds": folds}
    record |= {"audit": audit_labels(answers), "probably_wrong": len(wrong), "suspects": suspects}
    repeats = f"{arguments.folds} folds of lots"
    write_record(
        arguments.output, record, measures=MEASURES, repeats=repeats, precision=[fold["precision"] for fold in folds]
    )


def table_of_audit(record: dict) -> list[str]:
    """What a page says of a record."""
    audit, suspects = record["audit"], record["suspects"]
    listed = {name: sum(one["given"] == name for one in suspects) for name in audit["per_class"]}
    cells = [
        [name, f"{one['maps']:,}", str(one["lots"]), share_text(one["error_rate"], one["interval"]),
         f"{one['as_published']:.1%}",
         ", ".join(f"{other} ({share:.1%})" for other, share in one["really"][:2]) or "-", str(listed[name]),
         f"{one['perfect_f1']:.3f}"]
        for name, one in audit["per_class"].items()
    ]  # fmt: skip
    perfect, scores = audit["perfect"], [fold["macro_f1"] for fold in record["folds"]]
    interval = perfect["macro_f1_interval"]
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return [
        *rows(
            "given class, maps, lots, estimated to be wrong, by the published thresholds, most often really, of the "
            f"{len(suspects)} likeliest, F1 of a perfect classifier",
            cells,
        ),
        "",
        f"Of all {audit['n_samples']:,} maps {share_text(audit['error_rate'], audit['interval'])} are estimated to be "
        f"labelled wrongly. A classifier that is always right would score a macro F1 of {perfect['macro_f1']:.3f}"
        f"{bounds} against these labels; the networks asked here score {min(scores):.3f} to {max(scores):.3f} on the "
        f"fold that they have not seen. In brackets: {audit['interval_method']}.",
    ]


def share_text(share: float, interval: list[float] | None) -> str:
    return f"{share:.1%}" + (f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="real maps, as run_experiment.py takes them")
    parser.add_argument("--folds", type=int, default=5, help="groups of lots (default 5)")
    parser.add_argument("--epochs", type=int, default=12, help="of each fold's training (default 12)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=100, help="maps to draw and list (default 100)")
    parser.add_argument("--folder", type=Path, default=Path("label_audit"), help="for the folds' answers and trainings")
    parser.add_argument("--picture", type=Path, help="the sheet of wafers to draw (PNG)")
    parser.add_argument("--output", type=Path, help="the record to write; printed without it")
    arguments = parser.parse_args()

    from waferlab.errors import UserError

    try:
        run_audit(arguments)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

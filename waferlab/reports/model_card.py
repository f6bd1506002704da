"""The card of a model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from waferlab.records import write_atomically
from waferlab.reports.pages import Code, Page, Section, best_model, counted, data_section, pictures_of
from waferlab.reports.tables import (
    Items,
    Record,
    Table,
    classes_absent,
    classes_table,
    decision_table,
    format_number,
    offsets_table,
    values_table,
    with_interval,
)

FEW_MAPS = 30  # a class with fewer in the test part: one map more or less moves its recall by over 3 points


def write_model_card(summary: Record, *, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes MODEL_CARD.md and model_card.html for the best model of a pipeline's run.

    The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993).

    Args:
        summary: of the pipeline (`experiment_summary.json`).
        folder: where the cards go; `confusion_matrix.png` and `sample_predictions.png` there are shown.

    Returns:
        The Markdown and the HTML file.
    """
    folder, model = Path(folder), best_model(summary)
    files = [folder / "confusion_matrix.png", folder / "sample_predictions.png"]
    pictures = pictures_of(summary, [file for file in files if file.is_file()])
    sections = [
        Section("What it is for", [Items(_uses(model))]),
        Section("What it is not for", [Items(_misuses(summary))]),
        Section("How good it is", [_scores_of(model), classes_table(model), *pictures]),
        Section("Limits", [Items(_limits(summary, model))]),
        Section("How it decides", _decision(model)),
        Section("How to use it", _usage(summary, model)),
        data_section(summary),
        Section("How it was trained", _training(summary, model)),
        Section("Licence", [_licence(model)]),
        Section("Environment", [values_table(summary["environment"])]),
    ]
    page = Page(f"Model card: {model['model_type']}", _card_lead(model), _card_facts(summary), sections)
    markdown = write_atomically(folder / "MODEL_CARD.md", page.to_markdown().encode())
    return markdown, write_atomically(folder / "model_card.html", page.to_html().encode())


def _card_lead(model: Record) -> str:
    test = model["test"]
    score, absent = with_interval(test["macro_f1"], test["intervals"]["macro_f1"]), classes_absent(test)
    over = f" (over the {len(test['per_class']) - len(absent)} with test maps)" if absent else ""
    return (
        f"Sorts wafer maps into {len(test['per_class'])} classes: test macro F1{over} "
        f"{score}, accuracy {with_interval(test['accuracy'], test['intervals']['accuracy'])}, on "
        f"{counted(test['n_samples'], 'map')} from {counted(test['n_groups'], 'lot')} that it had never seen."
    )


def _card_facts(summary: Record) -> list[str]:
    registered = summary.get("registered")
    where = f"{registered['uri']}, version {registered['version']}" if registered else None
    return [summary["created"].replace("T", " "), where or "not registered", f"experiment {summary['experiment_name']}"]


def _uses(model: Record) -> list[str]:
    return [
        f"Sorting wafer maps by their failure pattern, one of: {', '.join(model['test']['per_class'])}.",
        "Finding lots and tools worth a look, ranking maps for review, counting patterns over time.",
    ]


def _misuses(summary: Record) -> list[str]:
    return [
        "Scrapping or releasing wafers without a second check.",
        f"Maps from elsewhere than {summary['data']['source']}, before it was measured on labelled lots from there.",
        "Maps with several patterns at once: it names one.",
        "Patterns that are not in the list: it has no answer for them and names the nearest, at times with confidence.",
        "Reading its confidence as a probability, before the calibration error below was judged good enough.",
    ]


def _scores_of(model: Record) -> Table:
    test, labels = (
        model["test"],
        {"macro_f1": "Macro F1", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"},
    )
    labels |= {"expected_calibration_error": "Expected calibration error"}
    rows = [
        [label, *(with_interval(model[part][key], model[part]["intervals"][key]) for part in ("test", "validation"))]
        for key, label in labels.items()
    ]
    area = [format_number(model[part]["roc_auc_ovr"], "{:.3f}") for part in ("test", "validation")]
    rows.append(["Area under the ROC curve, one against the rest", *area])
    note = f"In brackets, of the test part: {test['interval_method']}. Validation was used to choose."
    return Table(("Score", "Test", "Validation"), rows, note=note)


def _limits(summary: Record, model: Record) -> list[str]:
    test = model["test"]
    classes, config = test["per_class"], summary["config"]
    limits = [f"The test part has {counted(test['n_samples'], 'map')} from {counted(test['n_groups'], 'lot')}."]
    known = {name: row for name, row in classes.items() if row["support"]}
    if absent := classes_absent(test):
        limits.append(f"No test map, so nothing is known of: {', '.join(absent)}. They are in no average.")
    few = [f"{name} ({row['support']})" for name, row in known.items() if row["support"] < FEW_MAPS]
    if few:
        limits.append(f"Fewer than {FEW_MAPS} test maps, so known only roughly: {', '.join(few)}.")
    alone = [name for name, row in known.items() if row["f1_interval"] is None]
    if alone:
        limits.append(f"In fewer than two test lots, so without an interval: {', '.join(alone)}.")
    weakest = sorted(known, key=lambda name: known[name]["f1"])[:3]
    limits.append("Weakest classes: " + ", ".join(f"{name} (F1 {classes[name]['f1']:.3f})" for name in weakest) + ".")
    limits += _confusions(test)
    if "none" in classes and test["n_samples"]:
        share = classes["none"]["support"] / test["n_samples"]
        limits.append(
            f"{share:.1%} of the test maps are 'none'. With another share, precision and accuracy will differ."
        )
    if str(config["data"]) == "synthetic":
        limits.append("All maps are generated. How it does on real wafers has not been measured here.")
    limits.append(
        f"Trained once, with seed {config['seed']}: how far another training would differ is not in the intervals."
    )
    return [*limits, "Not tested: other products and lines, changes over time, maps with wrong or missing dies."]


def _confusions(test: Record) -> list[str]:
    """The three most frequent errors."""
    names, counts = list(test["per_class"]), np.array(test["confusion_matrix"])
    np.fill_diagonal(counts, 0)
    worst = [divmod(int(cell), len(names)) for cell in np.argsort(-counts, axis=None, kind="stable")[:3]]
    errors = [
        f"{names[true]} taken for {names[named]} ({counts[true, named]})"
        for true, named in worst
        if counts[true, named]
    ]
    return [f"Most frequent errors on test: {', '.join(errors)}."] if errors else []


def _decision(model: Record) -> list[str | Table]:
    rule = model.get("decision")
    if not rule:
        return ["The class with the highest probability (softmax of the network's output)."]
    views = "one view of the map" if rule["views"] == 1 else f"the mean over {rule['views']} symmetries of the map"
    text = (
        f"Probabilities are {views}, at temperature {rule['temperature']:.3f}, with class offsets for a prior of "
        f"strength {rule['prior_strength']:.2f}; the highest one names the class. The rule was fitted on validation."
    )
    return [text, decision_table([model]), offsets_table([model])]


def _usage(summary: Record, model: Record) -> list[str | Items | Code]:
    names = ", ".join(model["test"]["per_class"])
    contract = Items(
        [
            "In: maps as uint8 [rows, columns], any size: 0 no die, 1 pass, 2 fail. Resizing is part of the model.",
            f"Out: probabilities, float32 [maps, {len(model['test']['per_class'])}], in this order: {names}.",
        ]
    )
    registered, config = summary.get("registered"), summary["config"]
    if not registered:
        return [*_unregistered_usage(summary, model), contract]
    uri = config.get("tracking_uri") or "sqlite:///mlflow.db"
    code = f"""\
from pathlib import Path

import mlflow
import numpy as np

from waferlab.deployment.predictor import OnnxClassifier

mlflow.set_tracking_uri({uri!r})
folder = mlflow.artifacts.download_artifacts("{registered["uri"]}")
classifier = OnnxClassifier(next(Path(folder).glob("*.onnx")))
wafer_map = np.ones((30, 28), dtype=np.uint8)  # yours
probabilities = classifier.predict([wafer_map])
print(classifier.class_names[probabilities[0].argmax()], probabilities[0].max())"""
    apart = registered["largest_difference_to_checkpoint"]
    parity = f"The file's probabilities differ from the trained checkpoint's by at most {apart:.1e} on the test maps."
    where = "" if config.get("tracking_uri") else " In the folder where mlflow.db is:"
    return [f"{registered['verdict']}{where}", Code(code), contract, parity]


def _unregistered_usage(summary: Record, model: Record) -> list[str | Code]:
    code = """\
import json

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

summary = json.load(open("experiment_summary.json"))
record = next(m for m in summary["models"] if m["model_type"] == summary["best_model"])
model = IntegratedMLPipeline(ExperimentConfig(**summary["config"])).load_model(record)"""
    file = f"checkpoints/{summary['experiment_name']}/{model['model_type']}/{model['checkpoint']}"
    return [f"It was not registered. Its weights are in {file}:", Code(code)]


def _training(summary: Record, model: Record) -> list[str | Items | Table]:
    config = summary["config"]
    facts = [
        f"Seed {config['seed']}, for data, split, initial weights and batches.",
        f"Started from weights: {model['weights']}.",
        f"Weights kept: epoch {model['best_epoch']} of {model['epochs']} of the final training, best on validation.",
        f"{model['n_parameters']:,} parameters; {model['train_seconds']:.1f} s of training, in {model['precision']}; "
        f"{model['latency_ms']:.2f} ms a map on the CPU.",
    ]
    if model.get("weights_from", "final training") != "final training":
        facts[2] = (
            f"Weights kept: those of {model['weights_from']} of the search, better on validation than the final one."
        )
    if model.get("search"):
        facts.append(
            f"Parameters found in {counted(len(model['search']['trials']), 'trial')} ({model['search']['sampler']})."
        )
    return [Items(facts), values_table(model["parameters"], headings=("Parameter", "Value"))]


def _licence(model: Record) -> str:
    if model["model_type"] == "yolo_inspired":
        return (
            "The network is built from ultralytics, which is under AGPL-3.0: whoever distributes or serves this model, "
            "or a program with it, has to follow that licence or hold another one from ultralytics."
        )
    return (
        "Only `yolo_inspired` is built from ultralytics (AGPL-3.0), this model is not. The licences of the maps and of "
        "the weights that it started from apply."
    )

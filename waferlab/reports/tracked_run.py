"""What the tracker is told of a run, at its start and at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from waferlab.config import ExperimentConfig
from waferlab.data.maps import CLASS_NAMES, WaferMaps
from waferlab.data.splitting import Split
from waferlab.records import ModelResult, environment
from waferlab.reports.run_report import pictures_of_model
from waferlab.reports.tables import comparison_rows, results_table, table_markdown
from waferlab.tracking.runs import NoRuns, Run, RunTree

# Not what, but how or where: it may change when a run goes on, and a parameter cannot.
HOW = (
    "resume", "quiet", "output_dir", "pretrained_dir", "pretrained_wait", "enable_mlflow", "tracker", "tracking_uri",
    "storage", "heartbeat", "threads", "workers",
)  # fmt: skip


def start_pipeline_run(
    runs: RunTree | NoRuns, config: ExperimentConfig, maps: WaferMaps, split: Split, *, key: str
) -> Run:
    """Opens the run above all others, with the configuration, the data and the environment.

    Args:
        runs: the tree.
        config: of the run.
        maps: all of them.
        split: its three parts.
        key: by which the run is found again when it goes on.
    """
    run = runs.start(config.experiment_name, key=key)
    runs.params(run, **{name: value for name, value in asdict(config).items() if name not in HOW})
    runs.tags(run, **{f"environment.{name}": str(value) for name, value in environment().items()})
    counts = dict(zip(CLASS_NAMES, maps.class_counts.tolist(), strict=True))
    parts = {part: len(indices) for part, indices in split.parts().items()}
    runs.dataset(
        run, name=Path(maps.source).name, digest=split.fingerprint, source=str(maps.source),
        profile=json.dumps({"maps": len(maps), "split": parts, "classes": counts}),
    )  # fmt: skip
    runs.watch_system(run)
    return run


def track_epochs(runs: RunTree | NoRuns, run: Run, history: Mapping[str, Sequence[float]]) -> None:
    """The epochs of a trial, for the run of what goes on from it: so its curves begin where it began.

    Args:
        runs: the tree.
        run: of what goes on.
        history: see `History.series`.
    """
    series = {name: values for name, values in history.items() if name not in ("epoch", "learning_rate")}
    for i, epoch in enumerate(history["epoch"]):
        runs.metrics(run, {name: values[i] for name, values in series.items()}, step=int(epoch))


def track_outcome(
    config: ExperimentConfig, summary: Mapping[str, Any], results: Sequence[ModelResult], *, runs: RunTree | NoRuns,
    run: Run, model_runs: Mapping[str, Run],
) -> None:  # fmt: skip
    """Final scores, pictures and checkpoint of each model to its run, the comparison to the pipeline's.

    Args:
        config: of the run.
        summary: what was written down.
        results: of each model.
        runs: the tree.
        run: of the pipeline.
        model_runs: of each model; they are ended.
    """
    folder = config.results_dir
    for result in results:
        name, of_model, test = result.model_type, model_runs[result.model_type], result.test
        scores = {f"test_{score}": test[score] for score in ("accuracy", "macro_f1", "balanced_accuracy")}
        costs = {cost: getattr(result, cost) for cost in ("train_seconds", "latency_ms", "n_parameters")}
        runs.params(of_model, **{**result.parameters, "seed": config.seed})
        runs.metrics(of_model, scores | costs)
        runs.tags(of_model, weights=str(result.weights), weights_from=result.weights_from)
        pictures = pictures_of_model(result, folder=folder, alone=len(results) == 1)
        checkpoint = config.checkpoints_dir / name / result.checkpoint
        runs.files(of_model, [folder / f"per_class_{name}.csv", *pictures, checkpoint])
        runs.end(of_model)
    best = next(result for result in results if result.model_type == summary["best_model"])
    runs.metrics(run, {"best_test_macro_f1": best.test["macro_f1"]})
    runs.tags(run, best_model=summary["best_model"], seed=str(config.seed))
    written = ("experiment_summary.json", "report.html", "MODEL_CARD.md", "model_card.html")
    runs.files(run, [*sorted(folder.glob("*.png")), *(folder / name for name in written)])
    runs.note(run, table_markdown(results_table(comparison_rows(results), chosen=summary["best_model"])))

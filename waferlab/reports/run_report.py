"""All that a run leaves to look at: pictures, tables, pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from waferlab.config import ExperimentConfig
from waferlab.data.maps import WaferMaps
from waferlab.data.splitting import Split
from waferlab.evaluation.predictions import Predictions
from waferlab.records import ModelResult
from waferlab.reports.model_card import write_model_card
from waferlab.reports.pages import write_report
from waferlab.reports.run_figures import (
    plot_confusion_matrix,
    plot_model_comparison,
    plot_risk_coverage,
    plot_sample_predictions,
    plot_training_history,
    save_study_plots,
)
from waferlab.reports.tables import comparison_rows, write_per_class_table

FIRST = (
    "model_comparison.png", "confusion_matrix.png", "risk_coverage.png", "sample_predictions.png",
    "training_history.png",
)  # fmt: skip
OF_ONE_MODEL = ("optuna_*_*.png", "confusion_matrix_*.png", "training_history_*.png", "per_class_*.csv")
STUDY_PLOTS = ("history", "importances", "pareto_front", "slices")  # of `search.study.study_plots`


def draw_run(
    config: ExperimentConfig,
    results: Sequence[ModelResult],
    predictions: Sequence[Predictions],
    *,
    best: int,
    maps: WaferMaps,
    split: Split,
    searches: Mapping[str, Mapping[str, Callable[[], Any]]],
) -> None:
    """Draws the pictures of a run into its results; with several models also those of each.

    Args:
        config: of the run.
        results: a record a model.
        predictions: of each model, on the test part.
        best: the place of the best model in both.
        maps: all maps.
        split: its three parts.
        searches: the plots of each search, by model; see `search.study.study_plots`.
    """
    folder, name, n_test = config.results_dir, results[best].model_type, len(split.test)
    for earlier in (file for pattern in OF_ONE_MODEL for file in folder.glob(pattern) if not config.resume):
        earlier.unlink()  # of a run with other models or with a search
    title = f"{name}: {n_test:,} test maps"
    plot_confusion_matrix(predictions[best], path=folder / "confusion_matrix.png", title=title)
    plot_risk_coverage(
        predictions[best], sets=results[best].sets, path=folder / "risk_coverage.png",
        title=f"{name}: risk-coverage curve",
    )  # fmt: skip
    plot_sample_predictions(
        [maps[i] for i in split.test], predictions[best], path=folder / "sample_predictions.png",
        title=f"{name}: test maps, right and wrong", seed=config.seed,
    )  # fmt: skip
    plot_model_comparison(comparison_rows(results), path=folder / "model_comparison.png")
    histories = {result.model_type: result.history for result in results}
    plot_training_history(histories, path=folder / "training_history.png")
    for model_type, plots in searches.items():
        save_study_plots(plots, folder=folder, name=model_type)
    for result, predicted in zip(results, predictions, strict=True):
        one = result.model_type
        write_per_class_table(result.test, path=folder / f"per_class_{one}.csv")
        if len(results) > 1:
            title = f"{one}: {n_test:,} test maps"
            plot_confusion_matrix(predicted, path=folder / f"confusion_matrix_{one}.png", title=title)
            plot_training_history({one: result.history}, path=folder / f"training_history_{one}.png")


def pictures_of_model(result: ModelResult, *, folder: Path, alone: bool) -> list[Path]:
    """The pictures that are about one model; those of the whole run, if it is its only one."""
    name = result.model_type
    own = FIRST[1:] if alone else (f"confusion_matrix_{name}.png", f"training_history_{name}.png")
    return [*(folder / file for file in own), *_of_search(name, folder)]


def _of_search(name: str, folder: Path) -> list[Path]:
    """The pictures of a model's search; none of another whose name goes on where this one's ends."""
    return [file for what in STUDY_PLOTS if (file := folder / f"optuna_{name}_{what}.png").exists()]


def write_pages(summary: Mapping[str, Any], *, folder: Path) -> None:
    """The summary as one page to read, and a card of the best model."""
    models = [model["model_type"] for model in summary["models"]]
    searches = [file.name for name in models for file in _of_search(name, folder)]
    drawn = [name for name in (*FIRST, *searches) if (folder / name).exists()]
    write_report(summary, folder=folder, pictures=drawn, path=folder / "report.html")
    write_model_card(summary, folder=folder)

"""Promises about a run's pictures: they show what they are drawn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_up_predictions import CLASSES, LONG_NAME, RESULTS, assert_is_a_picture, make_predictions

from waferlab.evaluation.predictions import Predictions
from waferlab.reports import run_report
from waferlab.reports.run_figures import (
    _pick_samples,
    plot_confusion_matrix,
    plot_model_comparison,
    plot_risk_coverage,
    plot_sample_predictions,
    plot_training_history,
)
from waferlab.reports.style import FAIL_COLOUR, PASS_COLOUR
from waferlab.reports.wafers import die_colours, wafer_image

ROOT = Path(__file__).resolve().parents[2]


def make_wafer(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return np.where(x**2 + y**2 <= 1, 1 + (rng.random((height, width)) < 0.2), 0).astype(np.uint8)


@pytest.mark.parametrize("n_classes", [2, 9])
def test_confusion_matrix_is_drawn(tmp_path, n_classes):
    path = plot_confusion_matrix(make_predictions(n_classes=n_classes), path=tmp_path / "c.png", title="T")
    assert_is_a_picture(path)


@pytest.mark.parametrize("case", ["mixed", "none wrong", "all wrong", "three maps"])
def test_sample_predictions_are_drawn_from_maps_of_any_size(tmp_path, case):
    rng = np.random.default_rng(0)
    labels = np.arange(3 if case == "three maps" else 30) % 9
    certain = 0.91 * np.eye(9)[labels] + 0.01
    shifted = np.roll(certain, 1, axis=1)
    probabilities = {"none wrong": certain, "all wrong": shifted}.get(
        case, np.where(np.arange(len(labels))[:, None] % 2, certain, shifted)
    )
    predictions = Predictions(probabilities, labels, labels, CLASSES)
    maps = [make_wafer(*rng.integers(5, 212, size=2), rng) for _ in labels]
    maps[0] = np.zeros((5, 5), dtype=np.uint8)  # a wafer without a die must not stop the report
    path = plot_sample_predictions(maps, predictions, path=tmp_path / "s.png", title="T", seed=1)
    assert_is_a_picture(path)


def test_samples_show_every_class_once_and_the_most_confident_errors_first():
    predictions = make_predictions(n=2000)
    right, wrong = _pick_samples(predictions, limit=12, seed=0)
    assert sorted(predictions.labels[right[:9]]) == list(range(9))
    assert (predictions.predicted[right] == predictions.labels[right]).all()
    errors = predictions.predicted != predictions.labels
    assert errors[wrong].all()
    np.testing.assert_array_equal(predictions.confidence[wrong], np.sort(predictions.confidence[errors])[::-1][:12])
    assert right == _pick_samples(predictions, limit=12, seed=0)[0]
    assert right != _pick_samples(predictions, limit=12, seed=1)[0]


def test_wafer_image_keeps_the_dies_and_nothing_else():
    wafer_map = np.zeros((6, 7), dtype=np.uint8)  # padded: the dies are the 3 x 2 block
    wafer_map[1:4, 2:4] = [[1, 2], [1, 0], [2, 1]]
    image = wafer_image(die_colours(wafer_map))
    rows, columns = (image.shape[0] * np.array([1, 3, 5]) // 6, image.shape[1] * np.array([1, 3]) // 4)
    passed, failed = (bytes.fromhex(c[1:]) + b"\xff" for c in (PASS_COLOUR, FAIL_COLOUR))
    centres = [[bytes(image[row, column]) for column in columns] for row in rows]
    assert centres == [[passed, failed], [passed, bytes(4)], [failed, passed]]


def test_sample_predictions_refuses_maps_that_are_not_those_predicted(tmp_path):
    with pytest.raises(ValueError, match="3 wafer maps for 400 predictions"):
        plot_sample_predictions([np.ones((5, 5), np.uint8)] * 3, make_predictions(), path=tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "results",
    [
        RESULTS[:1],
        RESULTS,
        [*RESULTS, {"model_type": LONG_NAME, "macro_f1": 0.7, "macro_f1_interval": None}, {"model_type": "vit"}],
        [{"model_type": "vit"}],
    ],
    ids=["one", "four", "gaps and a long name", "nothing measured"],
)
def test_model_comparison_is_drawn(tmp_path, results):
    assert_is_a_picture(plot_model_comparison(results, path=tmp_path / "m.png"))


def make_history(n_epochs: int) -> dict[str, list[float | None]]:
    steps = np.linspace(0.1, 0.9, n_epochs)
    return {
        "epoch": list(range(1, n_epochs + 1)),
        "train_loss": (2 - steps).tolist(),
        "val_loss": (2.2 - steps).tolist(),
        "val_macro_f1": [None, *steps[1:].tolist()],
        "learning_rate": (1e-3 * (1 - steps)).tolist(),
        "train_macro_f1": [],  # never logged
    }


@pytest.mark.parametrize(
    "histories",
    [
        {"lightning_cnn": make_history(5)},
        {"lightning_cnn": make_history(60), "torchvision_resnet": make_history(45), LONG_NAME: make_history(2)},
        {"lightning_cnn": {"epoch": [1], "train_loss": [1.0]}, "yolo_inspired": {"epoch": []}},
    ],
    ids=["five epochs", "sixty epochs", "hardly anything recorded"],
)
def test_training_history_is_drawn(tmp_path, histories):
    assert_is_a_picture(plot_training_history(histories, path=tmp_path / "h.png"))


def test_a_series_of_the_wrong_length_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="lightning_cnn: val_loss has 1 values for 2 epochs"):
        plot_training_history({"lightning_cnn": {"epoch": [1, 2], "val_loss": [1.0]}}, path=tmp_path / "h.png")


def test_empty_reports_are_refused(tmp_path):
    with pytest.raises(ValueError, match="results are empty"):
        plot_model_comparison([], path=tmp_path / "m.png")
    with pytest.raises(ValueError, match="histories are empty"):
        plot_training_history({}, path=tmp_path / "h.png")


def test_the_same_figure_is_the_same_file(tmp_path):
    first = plot_model_comparison(RESULTS, path=tmp_path / "a.png")
    assert first.read_bytes() == plot_model_comparison(RESULTS, path=tmp_path / "b.png").read_bytes()


SETS = {"coverage": 0.9, "alone": 0.625, "error_alone": 0.25}


@pytest.mark.parametrize("sets", [SETS, SETS | {"error_alone": None, "alone": 0.0}, None])
@pytest.mark.parametrize("n_lots", [1, 20])
def test_the_risk_coverage_curve_is_drawn_with_and_without_sets_and_for_a_single_lot(tmp_path, sets, n_lots):
    predictions = make_predictions(n_lots=n_lots)
    path = plot_risk_coverage(predictions, sets=sets, path=tmp_path / "r.png", title=LONG_NAME)
    assert_is_a_picture(path)


def test_the_point_of_the_sets_and_that_of_all_maps_are_where_they_belong(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("waferlab.reports.run_figures.save", lambda figure, path: figures.append(figure) or path)
    predictions = make_predictions()
    plot_risk_coverage(predictions, sets=SETS, path=tmp_path / "r.png")
    curve, *points = figures[0].axes[0].lines
    everything = (1.0, (predictions.predicted != predictions.labels).mean())
    assert [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points] == [everything, (0.625, 0.25)]
    assert (curve.get_xdata()[-1], curve.get_ydata()[-1]) == everything


def test_the_pictures_of_a_search_are_not_those_of_a_model_whose_name_goes_on(tmp_path):
    for name in ("cnn", "cnn_wide"):
        (tmp_path / f"optuna_{name}_history.png").touch()
    assert [file.name for file in run_report._of_search("cnn", tmp_path)] == ["optuna_cnn_history.png"]

"""Promises about scores: scikit-learn's numbers, honest intervals, clear refusals."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up_predictions import CLASSES, from_hits, make_predictions
from scipy import stats
from sklearn import metrics as sk

from waferlab.evaluation.metrics import compare_macro_f1, compute_metrics, mean_over_lots, scores_by_grid
from waferlab.evaluation.predictions import Predictions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")  # scikit-learn's remark on absent classes
@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3] * 30, [4] * 50], ids=["all classes", "five absent", "one class"])
def test_metrics_are_scikit_learns_over_the_classes_that_have_maps(labels):
    predictions = make_predictions(labels=labels)
    metrics = compute_metrics(predictions)
    true, predicted, every = predictions.labels, predictions.predicted, range(9)
    present = np.unique(true)
    assert set(np.unique(predicted)) == set(every), "the case is to have calls of absent classes too"
    assert metrics["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    expected = sk.f1_score(true, predicted, labels=present, average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(expected)
    assert metrics["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, predicted))
    rows = list(metrics["per_class"].values())
    assert list(metrics["per_class"]) == list(CLASSES)
    scores = sk.precision_recall_fscore_support(true, predicted, labels=present, zero_division=0)
    for key, expected in zip(("precision", "recall", "f1", "support"), scores, strict=True):
        np.testing.assert_allclose([rows[label][key] for label in present], expected)
    for label in set(every) - set(present):
        assert rows[label] == {"precision": None, "recall": None, "f1": None, "support": 0, "f1_interval": None}
    assert metrics["confusion_matrix"] == sk.confusion_matrix(true, predicted, labels=every).tolist()


def test_roc_auc_is_scikit_learns_one_vs_rest():
    predictions = make_predictions()
    expected = sk.roc_auc_score(predictions.labels, predictions.probabilities, multi_class="ovr", average="macro")
    metrics = compute_metrics(predictions)
    assert metrics["roc_auc_ovr"] == pytest.approx(expected)
    assert metrics["roc_auc_ovr_note"] is None


def test_roc_auc_is_none_with_a_reason_when_a_class_is_absent():
    metrics = compute_metrics(make_predictions(labels=[0, 1, 2, 3, 4, 5, 6, 7] * 9))
    assert metrics["roc_auc_ovr"] is None
    assert "none" in metrics["roc_auc_ovr_note"]
    assert "Center" not in metrics["roc_auc_ovr_note"]


@pytest.mark.parametrize(
    ("hits", "confidence", "expected"),
    [
        ([True] * 8 + [False] * 2, 0.8, 0.0),  # says 80%, is right in 80%
        ([True] * 7 + [False] * 3, 1.0, 0.3),  # says 100%, is right in 70%
        ([True] * 10, 0.75, 0.25),  # too modest
        ([True, False, True, True], [0.6, 0.6, 0.9, 0.9], 0.1),  # |0.5 - 0.6| and |1 - 0.9|, in two bins
        ([True, False], [0.6, 0.59], 0.095),  # 9/15 belongs to the bin below it
        ([True, False, True, False], [0.99, 0.99, 0.95, 0.95], 0.47),  # one bin: gaps of one sign add up
    ],
)
def test_calibration_error_of_toy_cases(hits, confidence, expected):
    metrics = compute_metrics(from_hits(np.array(hits), confidence))
    assert metrics["expected_calibration_error"] == pytest.approx(expected)


def test_metrics_are_plain_json_and_say_how_they_were_made():
    metrics = compute_metrics(make_predictions(n_lots=12))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert (metrics["n_samples"], metrics["n_groups"]) == (400, 12)
    assert "95% jackknife over 12 lots" in metrics["interval_method"]
    comparison = compare_macro_f1(make_predictions(n_lots=12), make_predictions(n_lots=12))
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison
    assert "12 lots" in comparison["interval_method"]


def without_lot(predictions: Predictions, lot: int) -> Predictions:
    kept = predictions.groups != lot
    rest = (predictions.probabilities[kept], predictions.labels[kept], predictions.groups[kept])
    return Predictions(*rest, predictions.class_names)


def slow_scores(predictions: Predictions) -> dict[str, float]:
    true, predicted = predictions.labels, predictions.predicted
    return {
        "accuracy": sk.accuracy_score(true, predicted),
        "macro_f1": sk.f1_score(true, predicted, labels=np.unique(true), average="macro", zero_division=0),
        "balanced_accuracy": sk.balanced_accuracy_score(true, predicted),
        "first_class_f1": sk.f1_score(true, predicted, labels=[0], average="macro", zero_division=0),
        "expected_calibration_error": slow_calibration_error(predictions),
    }


def make_lots_of_few_classes() -> Predictions:
    """Ten lots; the first class is in three of them, the last in one, so that to leave that one out drops a class."""
    predictions = make_predictions(n=300, n_lots=10, seed=4)
    groups = predictions.groups.copy()
    groups[predictions.labels == 0] %= 3
    groups[predictions.labels == 8] = 7
    return dataclasses.replace(predictions, groups=groups)


@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")
def test_intervals_agree_with_a_plain_slow_jackknife():
    predictions = make_lots_of_few_classes()
    all_lots, n = slow_scores(predictions), 10
    without = [slow_scores(without_lot(predictions, lot)) for lot in range(n)]
    metrics = compute_metrics(predictions)
    found = metrics["intervals"] | {"first_class_f1": metrics["per_class"]["Center"]["f1_interval"]}
    for name, lots in {"accuracy": n, "macro_f1": n, "balanced_accuracy": n, "first_class_f1": 3}.items():
        angle = np.arcsin(np.sqrt(all_lots[name]))
        angles = np.arcsin(np.sqrt([scores[name] for scores in without]))
        half = stats.t.ppf(0.975, lots - 1) * np.sqrt((n - 1) / n * np.sum((angles - angle) ** 2))
        ends = np.clip([angle - half, angle + half], 0, np.pi / 2)
        np.testing.assert_allclose(found[name], np.sin(ends) ** 2, err_msg=name)
    error = all_lots["expected_calibration_error"]
    errors = np.array([scores["expected_calibration_error"] for scores in without])
    bias = (n - 1) * (errors.mean() - error)
    assert bias > 0
    half = stats.t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * np.sum((errors - error) ** 2))
    low = max(0, error - bias - half)
    np.testing.assert_allclose(found["expected_calibration_error"], [low, error + half])


@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")
def test_the_interval_of_a_difference_agrees_with_a_plain_slow_jackknife():
    new = make_lots_of_few_classes()
    old = dataclasses.replace(new, probabilities=new.probabilities[:, np.r_[0, 2, 1, 3:9]])  # takes two classes amiss
    differences = [
        slow_scores(without_lot(new, lot))["macro_f1"] - slow_scores(without_lot(old, lot))["macro_f1"]
        for lot in range(10)
    ]
    found = compare_macro_f1(new, old)
    scores = [slow_scores(p)["macro_f1"] for p in (new, old)]
    assert [found["new"], found["old"]] == pytest.approx(scores)
    assert found["difference"] == pytest.approx(scores[0] - scores[1])
    half = stats.t.ppf(0.975, 9) * np.sqrt(0.9 * np.sum((np.array(differences) - found["difference"]) ** 2))
    assert found["interval"] == pytest.approx([found["difference"] - half, found["difference"] + half])
    assert found["interval"][0] > 0, "the case is to show a difference"


def test_a_difference_that_no_lot_shows_is_not_known_to_be_nothing():
    same = make_predictions(n_lots=18)
    share = 1 - 0.05 ** (1 / 18)  # as many lots may differ, and 18 still be alike in one sample of twenty
    found = compare_macro_f1(same, same)
    assert (found["difference"], found["n_groups"]) == (0, 18)
    assert found["interval"] == pytest.approx([-share, share])


def test_a_difference_on_a_single_lot_may_be_any():
    found = compare_macro_f1(make_predictions(n_lots=1), make_predictions(n_lots=1, sharpness=4.0))
    assert found["interval"] == [-1, 1]
    assert "single lot" in found["interval_method"]


@pytest.mark.parametrize("change", [{"labels": np.zeros(400, int)}, {"groups": np.zeros(400, int)}])
def test_predictions_of_different_maps_are_not_compared(change):
    with pytest.raises(ValueError, match="not of the same maps"):
        compare_macro_f1(make_predictions(), dataclasses.replace(make_predictions(), **change))


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 6.0, 30.0])
def test_every_interval_holds_its_score_and_lies_within_its_bounds(sharpness):
    for seed in range(20):
        predictions = make_predictions(n=60, n_lots=2 + seed % 7, seed=seed, sharpness=sharpness)
        metrics = compute_metrics(predictions)
        rows = [row for row in metrics["per_class"].values() if row["f1_interval"]]
        pairs = [(metrics[name], interval) for name, interval in metrics["intervals"].items()]
        for score, (low, high) in pairs + [(row["f1"], row["f1_interval"]) for row in rows]:
            assert 0 <= low <= score <= high <= 1
        worse = make_predictions(n=60, n_lots=2 + seed % 7, seed=seed, sharpness=1.0)
        comparison = compare_macro_f1(predictions, worse)
        assert -1 <= comparison["interval"][0] <= comparison["difference"] <= comparison["interval"][1] <= 1


def test_a_class_without_an_error_is_known_as_well_as_its_lots_allow():
    labels, groups = np.arange(120) % 3, np.arange(120) // 3 % 4 + np.arange(120) % 3 * 4  # each class has four lots
    probabilities = np.where(np.eye(3)[labels] > 0, 0.8, 0.1)
    probabilities[labels == 2] = [0.1, 0.8, 0.1]
    rows = compute_metrics(Predictions(probabilities, labels, groups, ("a", "b", "c")))["per_class"]
    assert rows["a"]["f1_interval"] == pytest.approx([0.05**0.25, 1])
    assert rows["c"]["f1_interval"] == pytest.approx([0, 1 - 0.05**0.25])  # never found


def slow_calibration_error(predictions: Predictions) -> float:
    error, hit = 0.0, predictions.predicted == predictions.labels
    for index in range(15):
        inside = (predictions.confidence > index / 15) & (predictions.confidence <= (index + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - predictions.confidence[inside].mean())
    return error


def test_interval_over_lots_is_wider_than_over_maps_when_errors_cluster_in_lots():
    lots = np.repeat(np.arange(40), 25)
    bad_lot = np.random.default_rng(0).random(40) < 0.3
    predictions = from_hits(~bad_lot[lots], 0.9, lots)
    by_lot = compute_metrics(predictions)["intervals"]["accuracy"]
    by_map = compute_metrics(dataclasses.replace(predictions, groups=np.arange(1000)))["intervals"]["accuracy"]
    assert np.diff(by_lot) > 3 * np.diff(by_map)  # 25 equal answers a lot are one answer: sqrt(25) = 5 times wider
    assert by_lot[0] < compute_metrics(predictions)["accuracy"] < by_lot[1]


def test_a_single_lot_has_no_intervals_and_says_so():
    metrics = compute_metrics(make_predictions(n_lots=1))
    assert set(metrics["intervals"].values()) == {None}
    assert "single lot" in metrics["interval_method"]
    assert all(row["f1_interval"] is None for row in metrics["per_class"].values())


def test_a_class_seen_in_one_lot_only_has_no_interval():
    predictions = make_predictions(n_classes=3, labels=[0, 1] * 50 + [2] * 10)
    groups = np.concatenate([predictions.groups[:100], np.full(10, 7)])
    rows = compute_metrics(dataclasses.replace(predictions, groups=groups))["per_class"]
    assert rows["Edge-Loc"]["f1_interval"] is None
    assert rows["Donut"]["f1_interval"] is not None


def test_intervals_do_not_change_from_call_to_call_nor_with_the_numbering_of_lots():
    predictions = make_predictions()
    renumbered = dataclasses.replace(predictions, groups=10_000 - predictions.groups * 1000)
    first, again, other = (compute_metrics(p) for p in (predictions, predictions, renumbered))
    assert first == again
    for name, interval in first["intervals"].items():
        assert other["intervals"][name] == pytest.approx(interval)


@pytest.mark.long
def test_intervals_hold_the_truth_as_often_as_promised_where_percentiles_do_not(tmp_path):
    output, script = tmp_path / "coverage.json", ROOT / "benchmarks/interval_coverage.py"
    flags = ("--lots", "18", "--repeats", "60", "--truth-lots", "2000", "--output", str(output))
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(output.read_text())
    (setting,) = record["settings"]
    scores = setting["scores"]
    for found in (scores["macro_f1"], scores["class_f1"], *setting["differences"]):
        assert found["product"]["coverage"] >= 0.9
        assert 0 < found["product"]["mean_width"] < 0.75
    assert scores["macro_f1"]["percentile"]["coverage"] < 0.8
    assert scores["macro_f1"]["product"]["mean_width"] < scores["macro_f1"]["percentile"]["mean_width"]
    lead, none = setting["differences"]
    assert (lead["truth"], none["truth"]) == (pytest.approx(0.02, abs=0.005), 0)
    assert record["fewest_lots_with_differences_covered_in_90_percent"] == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": np.array([[0.5, 0.5], [2.0, -1.0]])}, "row 1.*softmax"),
        ({"probabilities": np.array([[0.5, 0.5], [0.5, 0.4]])}, r"row 1.*sum 0\.9"),
        ({"probabilities": np.array([[np.nan, 0.5], [0.5, 0.5]])}, "row 0.*nan"),
        ({"probabilities": np.full((2, 3), 1 / 3)}, r"\(2, 3\).*2 class names"),
        ({"probabilities": np.empty((0, 2))}, "at least one map"),
        ({"labels": np.array([0, 2])}, r"labels are 0\.\.2.*0\.\.1"),
        ({"labels": np.array([0, -1])}, r"labels are -1"),
        ({"labels": np.array([0.0, 1.0])}, "labels must be 2 integers.*float64"),
        ({"groups": np.array([0, 1, 2])}, "groups must be 2 integers"),
        ({"class_names": ("good", "good")}, "class_names must differ"),
    ],
)
def test_bad_predictions_are_refused_with_the_reason(change, message):
    good = {
        "probabilities": np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32),
        "labels": np.array([0, 1]),
        "groups": np.array([0, 0]),
        "class_names": ("good", "bad"),
    }
    assert Predictions(**good).confusion().tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match=message):
        Predictions(**good | change)


def test_evaluation_knows_nothing_of_training_and_its_import_is_light():
    code = "import sys, waferlab.evaluation.metrics; print([m for m in sys.modules if '.' not in m])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = set(ast.literal_eval(output))
    heavy = {"torch", "lightning", "mlflow", "optuna", "pandas", "sklearn", "scipy", "seaborn"}
    own = {"integrated_pipeline", "simple_model"}
    assert not loaded & (heavy | own)
    assert "matplotlib.pyplot" not in output


def test_the_mean_over_maps_varies_as_lots_do():
    rng, lots = np.random.default_rng(0), np.array([3, 9, 12, 40])
    alone = rng.normal(size=4)
    mean, (low, high) = mean_over_lots(alone, lots)  # with one map a lot, it is the t interval
    half = stats.t.ppf(0.975, 3) * alone.std(ddof=1) / 2
    np.testing.assert_allclose([mean, low, high], [alone.mean(), alone.mean() - half, alone.mean() + half])
    np.testing.assert_allclose(mean_over_lots(alone.repeat(5), lots.repeat(5))[1], [low, high])
    assert mean_over_lots(alone, np.zeros(4)) == (mean, None)


# --- by the size of the grid


def test_each_size_of_grid_has_the_scores_of_its_maps_and_only_those_that_are_there():
    predictions = make_predictions()
    n = len(predictions.labels)
    sides = np.where(np.arange(n) % 2 == 0, 30, 56)
    shapes = np.stack([np.full(n, 20), sides], axis=1)  # the longest side counts
    small, large = scores_by_grid(predictions, shapes)
    assert (small["longest_side"], large["longest_side"]) == ("up to 30 dies", "over 55 dies")
    for found, chosen in ((small, sides == 30), (large, sides == 56)):
        true, predicted = predictions.labels[chosen], predictions.predicted[chosen]
        there = np.unique(true)
        expected = sk.f1_score(true, predicted, labels=there, average="macro", zero_division=0)
        assert found["macro_f1"] == pytest.approx(expected) and found["n_samples"] == chosen.sum()
        assert found["interval"][0] <= found["macro_f1"] <= found["interval"][1]
        recalls = sk.recall_score(true, predicted, labels=range(9), average=None, zero_division=0)
        for label, recall in enumerate(found["recall"].values()):
            assert recall == (pytest.approx(recalls[label]) if label in there else None)
    (middle,) = scores_by_grid(predictions, np.full((n, 2), 31))
    assert middle["longest_side"] == "31 to 55 dies" and middle["macro_f1"] == compute_metrics(predictions)["macro_f1"]

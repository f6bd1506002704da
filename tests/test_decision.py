"""Promises about the decision: chosen on validation only, never blind to what it costs, the same in every form."""

import numpy as np
import pytest
import torch

from decision import Decision, choose_decision, fit_temperature
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline


def made_up(counts, *, seed=0, lean=0.0, sharpness=1.0):
    """Probabilities of a good classifier of `counts` maps a class that leans by `lean` times the log frequency."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    scores = rng.normal(0, 1, (len(labels), len(counts)))
    scores[np.arange(len(labels)), labels] += 1.5
    scores += lean * np.log(np.array(counts) / sum(counts))
    scores *= sharpness
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True), labels


COUNTS = np.array([2000, 400, 100, 50])


def test_a_lean_to_rare_classes_is_taken_back():
    probabilities, labels = made_up(COUNTS, lean=-1.0)
    decision = choose_decision({1: probabilities, 8: probabilities}, labels, COUNTS)
    assert decision.prior_strength > 0.5
    answered = decision.apply(torch.from_numpy(probabilities)).argmax(1).numpy()
    assert (answered == labels).mean() > (probabilities.argmax(1) == labels).mean() + 0.1


def test_equally_frequent_classes_are_left_alone():
    probabilities, labels = made_up([300] * 4)
    decision = choose_decision({1: probabilities, 8: probabilities}, labels, np.full(4, 300))
    assert (decision.views, decision.prior_strength, decision.offsets) == (1, 0.0, ())


def test_eight_views_are_taken_only_where_they_gain():
    one, labels = made_up(COUNTS)
    other = (one + np.eye(4)[labels] * 0.2) / 1.2
    assert choose_decision({1: one, 8: other}, labels, COUNTS).views == 8
    assert choose_decision({1: other, 8: one}, labels, COUNTS).views == 1


def test_the_temperature_undoes_overconfidence_and_changes_no_answer():
    honest, labels = made_up([500] * 4)
    sharp, _ = made_up([500] * 4, sharpness=3.0)
    ratio = fit_temperature(sharp, labels) / fit_temperature(honest, labels)
    assert ratio == pytest.approx(3.0, rel=0.01)
    answered = Decision(temperature=3.0).apply(torch.from_numpy(sharp)).numpy()
    np.testing.assert_allclose(answered, honest, atol=1e-6)


def test_the_test_part_has_no_say(tiny_npz, tmp_path):
    """Labels of test maps are shuffled: the decision stays, only its scores on test change."""
    config = ExperimentConfig(
        model_type="lightning_cnn", data=tiny_npz, image_size=16, max_epochs=1, enable_optuna=False,
        enable_mlflow=False, output_dir=tmp_path, quiet=True, tune_decision=True,
    )  # fmt: skip
    pipeline = IntegratedMLPipeline(config)
    record = pipeline.train_final_model("lightning_cnn")
    (first,), _ = pipeline.evaluate([record])
    pipeline.maps.labels[pipeline.split.test] = np.roll(pipeline.maps.labels[pipeline.split.test], 7)
    (second,), _ = pipeline.evaluate([record])
    chosen = ("views", "prior_strength", "offsets", "temperature", "validation_macro_f1_after")
    assert all(first["decision"][key] == second["decision"][key] for key in chosen)
    assert first["test"]["macro_f1"] != second["test"]["macro_f1"]
    assert first["decision"]["validation_macro_f1_after"] == first["validation"]["macro_f1"]

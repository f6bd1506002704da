"""Promises about the decision: chosen on validation only, never blind to what it costs, the same in every form."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.deployment.onnx_export import export_onnx
from waferlab.deployment.predictor import Predictor
from waferlab.evaluation.decision import Decision, choose_decision, fit_temperature
from waferlab.evaluation.inference import decision_of


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


def test_seven_views_are_spared_where_the_first_is_sure_and_no_answer_changes_for_it():
    one, labels = made_up([500] * 4, sharpness=2)
    doubt = np.roll(one, 1, axis=0) * (one.max(1, keepdims=True) < 0.6)  # eight views differ where one is not sure
    eight = (one + np.eye(4)[labels] * (doubt > 0).any(1, keepdims=True)) / (1 + (doubt > 0).any(1, keepdims=True))
    decision = choose_decision({1: one, 8: eight}, labels, np.full(4, 500))
    assert decision.views == 8 and 0.6 <= decision.sure_at < np.quantile(one.max(1), 0.55)
    assert decision.needs == (1, 8)
    answered = decision.of_views({1: one, 8: eight}).argmax(1)
    always = dataclasses.replace(decision, sure_at=None).of_views({1: one, 8: eight}).argmax(1)
    assert (answered != always).mean() <= 0.001 and (answered != one.argmax(1)).mean() > 0.05


def test_where_one_view_is_sure_of_what_eight_deny_it_is_not_believed():
    one, labels = made_up([500] * 4, sharpness=5)
    eight = (np.eye(4)[labels] + 0.1) / 1.4
    assert choose_decision({1: one, 8: eight}, labels, np.full(4, 500)).sure_at is None


def test_the_answer_does_not_jump_where_the_views_change_over():
    one, eight = np.array([[0.9, 0.1]]), np.array([[0.2, 0.8]])
    decision = Decision(views=8, sure_at=0.9 + 1e-6)
    beside = dataclasses.replace(decision, sure_at=0.9)
    np.testing.assert_allclose(decision.of_views({1: one, 8: eight}), beside.of_views({1: one, 8: eight}), atol=1e-4)
    far = dataclasses.replace(decision, sure_at=0.96)
    np.testing.assert_allclose(far.of_views({1: one, 8: eight}), eight)


def test_the_temperature_undoes_overconfidence_and_changes_no_answer():
    honest, labels = made_up([500] * 4)
    sharp, _ = made_up([500] * 4, sharpness=3.0)
    ratio = fit_temperature(sharp, labels) / fit_temperature(honest, labels)
    assert ratio == pytest.approx(3.0, rel=0.01)
    answered = Decision(temperature=3.0).apply(torch.from_numpy(sharp)).numpy()
    np.testing.assert_allclose(answered, honest, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.125, 1.0, 8.0])
def test_a_class_left_out_gets_exactly_nothing_and_the_others_share_one(dtype, temperature):
    network = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    answered = Decision(temperature=temperature, left_out=(1,)).apply(network)
    assert (answered[:, 1] == 0).all()
    assert torch.allclose(answered.sum(1), torch.ones(3, dtype=dtype))
    assert answered[:, 0].argmax() == 2 and answered[2, 0] > 0.9
    alone = Decision(temperature=temperature).apply(network[:, [0, 2]])
    assert torch.allclose(answered[:, [0, 2]], alone)


def with_an_unknown_class(probabilities, most):
    """What a network also says of a class that it never saw, up to `most`; as class 2."""
    said = np.random.default_rng(1).uniform(0, most, (len(probabilities), 1))
    return np.insert(probabilities * (1 - said), [2], said, axis=1)


def test_a_class_without_training_maps_is_left_out_and_moves_nothing_else():
    probabilities, labels = made_up(COUNTS, lean=-1.0)
    wider = with_an_unknown_class(probabilities, 0.9)
    expected = choose_decision({1: probabilities, 8: probabilities}, labels, COUNTS)
    counts, classes = np.insert(COUNTS, 2, 0), np.array([0, 1, 3, 4])
    decision = choose_decision({1: wider, 8: wider}, classes[labels], counts)
    assert decision.left_out == (2,)
    assert decision.prior_strength == expected.prior_strength != 0
    assert np.delete(decision.offsets, 2) == pytest.approx(expected.offsets)
    assert decision.temperature == pytest.approx(expected.temperature, rel=1e-3)
    answered = decision.apply(torch.from_numpy(wider)).numpy()
    np.testing.assert_allclose(answered[:, classes], expected.apply(torch.from_numpy(probabilities)), atol=1e-3)


def test_what_is_said_of_a_class_left_out_does_not_keep_eight_views_away():
    one, labels = made_up(COUNTS)
    other = (one + np.eye(4)[labels] * 0.2) / 1.2
    by_views = {1: with_an_unknown_class(one, 0.0), 8: with_an_unknown_class(other, 0.99)}
    assert choose_decision(by_views, np.array([0, 1, 3, 4])[labels], np.insert(COUNTS, 2, 0)).views == 8


def test_a_class_that_validation_lacks_does_not_weigh_in():
    """Two lots hold it, which training and test have: whatever the leaning, its F1 on validation would be 0."""
    probabilities, labels = made_up(COUNTS, lean=-1.0)
    some = labels != 3
    decision = choose_decision({1: probabilities[some], 8: probabilities[some]}, labels[some], COUNTS)
    assert decision.left_out == ()
    answered = decision.apply(torch.from_numpy(probabilities[some])).argmax(1).numpy()
    assert (answered == labels[some]).mean() > (probabilities[some].argmax(1) == labels[some]).mean() + 0.1


def test_eight_of_nine_classes_are_trained_scored_and_exported(tiny_arrays, tmp_path):
    maps = load_wafer_maps(save_without("Donut", tiny_arrays, tmp_path))
    config = ExperimentConfig(
        model_type="lightning_cnn", data=tmp_path / "eight.npz", image_size=16, max_epochs=1, enable_optuna=False,
        enable_mlflow=False, output_dir=tmp_path,
    )  # fmt: skip
    said = io.StringIO()
    pipeline = IntegratedMLPipeline(config, console=Console(file=said, width=200))
    record = pipeline.train_final_model("lightning_cnn")
    assert f"Dataset ready: {len(maps)} samples, 8 classes" in said.getvalue()
    assert "Donut: no map in these data" in said.getvalue()
    assert np.isfinite(record.history["train_loss"]).all()
    for tuned in (True, False):
        pipeline.config = dataclasses.replace(config, tune_decision=tuned)
        assert_scored_and_exported(pipeline, record, tmp_path / "m.onnx")


def assert_scored_and_exported(pipeline, record, file):
    (result,), (predictions,) = pipeline.evaluate([record])
    maps, eight = pipeline.maps, [name for name in CLASS_NAMES if name != "Donut"]
    assert list(predictions.class_names) == list(result.test["per_class"]) == eight
    truth = np.array(CLASS_NAMES)[maps.labels[pipeline.split.test]]
    assert np.array_equal(np.array(eight)[predictions.labels], truth)
    decision = decision_of(result)
    assert decision.left_out == (CLASS_NAMES.index("Donut"),)
    export_onnx(pipeline.load_model(result), file, image_size=16, decision=decision)
    classifier = Predictor(file)
    assert list(classifier.class_names) == eight
    answered = classifier.probabilities([maps[i] for i in pipeline.split.test])
    np.testing.assert_allclose(answered, predictions.probabilities, atol=1e-5)


def save_without(name, arrays, folder):
    lengths, kept = np.diff(arrays["offsets"]), arrays["labels"] != name
    np.savez(
        folder / "eight.npz",
        maps_flat=arrays["maps_flat"][np.repeat(kept, lengths)],
        offsets=np.concatenate([[0], np.cumsum(lengths[kept])]),
        **{key: arrays[key][kept] for key in ("shapes", "labels", "group")},
    )
    return folder / "eight.npz"


def test_the_test_part_has_no_say(tiny_npz, tmp_path):
    """Test maps are labelled as they are answered: the decision stays, only its scores on test change."""
    config = ExperimentConfig(
        model_type="lightning_cnn", data=tiny_npz, image_size=16, max_epochs=1, enable_optuna=False,
        enable_mlflow=False, output_dir=tmp_path, quiet=True, tune_decision=True,
    )  # fmt: skip
    pipeline = IntegratedMLPipeline(config)
    record = pipeline.train_final_model("lightning_cnn")
    (first,), (answers,) = pipeline.evaluate([record])
    pipeline.maps.labels[pipeline.split.test] = answers.predicted
    (second,), _ = pipeline.evaluate([record])
    chosen = ("views", "prior_strength", "offsets", "temperature", "validation_macro_f1_after")
    assert all(first.decision[key] == second.decision[key] for key in chosen)
    assert first.test["accuracy"] < second.test["accuracy"] == 1
    assert first.decision["validation_macro_f1_after"] == first.validation["macro_f1"]

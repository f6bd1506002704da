"""Promises about scores: from the weights of a training to the answers, as documented and as exported."""

import math

import numpy as np
import pytest
import torch
from made_up import as_trained
from torch import nn

from waferlab.data.images import encode, symmetries
from waferlab.data.maps import CLASS_NAMES
from waferlab.evaluation.decision import Decision, choose_decision, fit_temperature
from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.tracking.runs import Run

LEAN = Decision(views=8, prior_strength=0.5, offsets=tuple(np.linspace(-1, 1, 9).tolist()), temperature=2.5)


def answered_by_hand(model, images, decision):
    """The formula of the documentation, in double precision: mean over views, offsets, temperature."""
    with torch.inference_mode():
        views = list(symmetries(images))[: decision.views]
        mean = torch.stack([model(encode(view)).double().softmax(-1) for view in views]).mean(0)
    scores = mean.log() + torch.tensor(decision.offsets or (0.0,) * 9)
    return (scores / decision.temperature).softmax(-1).numpy()


@pytest.mark.parametrize("chosen", [LEAN, Decision(temperature=0.6), None], ids=["all", "temperature", "not tuned"])
def test_scores_are_those_of_the_answers_with_views_offsets_and_temperature(chosen, trained, monkeypatch):
    made = as_trained(trained, tune_decision=chosen is not None)
    monkeypatch.setattr("waferlab.evaluation.inference.choose_decision", lambda *_, **__: chosen)
    (result,), (predicted,) = made.evaluate([trained[1]])
    model = made.load_model(trained[1])
    for part in ("validation", "test"):
        answers = answered_by_hand(model, made.data_module().images(part), chosen or Decision())
        indices = made.split.parts()[part]
        by_hand = Predictions(answers, made.maps.labels[indices], made.maps.groups[indices], CLASS_NAMES)
        expected = compute_metrics(by_hand)
        for name in ("accuracy", "macro_f1", "expected_calibration_error", "roc_auc_ovr"):
            # In float32 two answers can tie that do not in float64, which moves the area under the curve a little.
            assert getattr(result, part)[name] == pytest.approx(expected[name], abs=1e-3), (part, name)
        assert getattr(result, part)["confusion_matrix"] == expected["confusion_matrix"]
    np.testing.assert_allclose(predicted.probabilities, answers, atol=1e-5)
    assert predicted.class_names == CLASS_NAMES
    if chosen:
        plain = answered_by_hand(model, made.data_module().images("test"), Decision())
        assert np.abs(plain - answers).max() > 0.02  # what was chosen makes a difference here
        kept = result.decision
        assert (kept["views"], kept["temperature"]) == (chosen.views, chosen.temperature)
        assert tuple(kept["offsets"]) == chosen.offsets


def test_the_decision_is_chosen_from_validation_answers_and_training_counts(trained, monkeypatch):
    made, asked = as_trained(trained, tune_decision=True), []
    monkeypatch.setattr(
        "waferlab.evaluation.inference.choose_decision", lambda *given: asked.append(given) or choose_decision(*given)
    )
    made.evaluate([trained[1]])
    ((by_views, labels, counts),) = asked
    model, images = made.load_model(trained[1]), made.data_module().images("validation")
    for views in (1, 8):
        np.testing.assert_allclose(by_views[views], answered_by_hand(model, images, Decision(views=views)), atol=1e-5)
    assert labels.tolist() == made.maps.labels[made.split.validation].tolist()
    assert counts.tolist() == np.bincount(made.maps.labels[made.split.train], minlength=9).tolist()


def test_the_chosen_temperature_fits_the_answers_that_it_is_applied_to():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [800, 400, 200, 100])
    scores = rng.normal(0, 1, (len(labels), 4))
    scores[np.arange(len(labels)), labels] += 1.5
    sharp = torch.from_numpy(3 * scores).softmax(-1).numpy()
    decision = choose_decision({1: sharp, 8: sharp}, labels, np.bincount(labels))
    assert decision.temperature > 1.5
    answered = decision.apply(torch.from_numpy(sharp)).numpy()
    assert fit_temperature(answered, labels) == pytest.approx(1, abs=0.01)  # nothing is left to correct
    assert answered[np.arange(len(labels)), labels].mean() < sharp[np.arange(len(labels)), labels].mean()


def chosen_by_hand(by_views, labels, counts):
    """What the documentation of `choose_decision` says, in plain loops; views, strength and offsets."""
    strengths = [i / 8 for i in range(-6, 7)]
    trained = [c for c, count in enumerate(counts) if count > 0]
    logs = [math.log(max(count, 1) / sum(counts)) for count in counts]
    mean = sum(logs[c] for c in trained) / len(trained)
    shares = [logs[c] - mean if c in trained else 0.0 for c in range(len(counts))]
    smoothed = {}
    for views, probabilities in by_views.items():
        possible = np.maximum(probabilities, 1e-12) * [c in trained for c in range(len(counts))]
        log_possible = np.log(np.maximum(possible / possible.sum(1, keepdims=True), 1e-12))
        scores = []
        for strength in strengths:
            said = (log_possible + strength * np.array(shares)).argmax(1)
            f1 = [
                2 * ((said == c) & (labels == c)).sum() / ((said == c).sum() + (labels == c).sum())
                for c in sorted(set(labels.tolist()))
            ]
            scores.append(np.mean(f1))
        padded = [scores[0], *scores, scores[-1]]
        smoothed[views] = [sum(padded[i : i + 3]) / 3 for i in range(len(scores))]
    views = 8 if max(smoothed[8]) - max(smoothed[1]) > 0.002 else 1
    top = max(round(score, 6) for score in smoothed[views])
    best = [strength for strength, score in zip(strengths, smoothed[views], strict=True) if round(score, 6) == top]
    strength = min(best, key=abs)
    offsets = [strength * share for share in shares]
    return views, strength, offsets if strength else []


@pytest.mark.parametrize("seed", range(12))
def test_views_and_prior_correction_are_chosen_as_documented(seed):
    """Few maps of some classes, of one none in validation, of one none in training; answers that lean either way."""
    rng = np.random.default_rng(seed)
    counts = rng.permutation([3000, 400, 90, 30, 1, 0])
    labels = rng.choice(6, 150, p=np.sqrt(counts) / np.sqrt(counts).sum())
    scores = rng.normal(0, 1, (150, 6)) + rng.uniform(-0.6, 0.6) * np.log(np.maximum(counts, 1))
    scores[np.arange(150), labels] += 1.5
    by_views = {views: softmax(scores + rng.normal(0, noise, (150, 6))) for views, noise in ((1, 0.5), (8, 0.4))}
    by_views[1][:9] = np.eye(6)[rng.integers(6, size=9)]  # probabilities of exactly 0, as float32 has them
    decision = choose_decision(by_views, labels, counts)
    views, strength, offsets = chosen_by_hand(by_views, labels, counts)
    assert (decision.views, decision.prior_strength) == (views, strength)
    np.testing.assert_allclose(decision.offsets, offsets, rtol=1e-12, atol=1e-12)
    assert decision.left_out == tuple(np.flatnonzero(counts == 0))
    answered = Decision(offsets=decision.offsets, left_out=decision.left_out).apply(torch.from_numpy(by_views[views]))
    assert decision.temperature == pytest.approx(fit_temperature(answered.numpy(), labels), rel=1e-6)


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


@pytest.mark.parametrize(("gain", "views"), [(19, 1), (21, 8)])
def test_eight_views_must_gain_two_thousandths(gain, views):
    labels = np.arange(10_000) % 2

    def right_but_for(errors):  # as many of one class as of the other, so that macro F1 is the share of right answers
        said = np.where(np.arange(10_000) < errors, 1 - labels, labels)
        return 0.8 * np.eye(2)[said] + 0.1

    by_views = {1: right_but_for(200), 8: right_but_for(200 - gain)}
    assert choose_decision(by_views, labels, np.array([50, 50])).views == views


def test_a_correction_is_computed_in_the_precision_of_the_answers():
    probabilities = softmax(np.random.default_rng(0).normal(size=(20, 3)))
    decision = Decision(offsets=(1 / 3, -1 / 7, 0.1), temperature=1.3)
    expected = softmax((np.log(probabilities) + np.array(decision.offsets)) / 1.3)
    answered = decision.apply(torch.from_numpy(probabilities))
    assert answered.dtype == torch.float64
    np.testing.assert_allclose(answered.numpy(), expected, rtol=1e-12)
    assert decision.apply(torch.from_numpy(probabilities).float()).dtype == torch.float32
    certain = decision.apply(torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.isfinite(certain).all() and certain[0, 0] > 0.99


def test_a_temperature_stays_between_an_eighth_and_eight():
    labels = np.arange(40) % 4
    always_right, always_wrong = np.eye(4)[labels], np.eye(4)[(labels + 1) % 4]
    assert fit_temperature(0.5 * always_right + 0.125, labels) == pytest.approx(1 / 8, rel=1e-3)
    assert fit_temperature(always_wrong, labels) == pytest.approx(8, rel=1e-3)


def test_one_map_whose_class_was_given_no_chance_does_not_decide_the_temperature():
    labels = np.arange(4000) % 4
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (4000, 4)) + 1.5 * np.eye(4)[labels]
    probabilities = softmax(scores)
    before = fit_temperature(probabilities, labels)
    probabilities[0] = np.eye(4)[(labels[0] + 1) % 4]
    assert fit_temperature(probabilities, labels) == pytest.approx(before, rel=0.05)


def test_the_exported_file_gets_the_decision_and_the_weights_of_the_record(trained, monkeypatch):
    class Exported(Exception):
        pass

    asked = {}

    def export(model, path, **more):
        asked.update(more, model=model)
        raise Exported

    made = as_trained(trained, tune_decision=True)
    monkeypatch.setattr("waferlab.evaluation.inference.choose_decision", lambda *_, **__: LEAN)
    monkeypatch.setattr("integrated_pipeline.export_onnx", export)
    (result,), (predicted,) = made.evaluate([trained[1]])
    made.config.enable_mlflow = True
    made.model_runs["lightning_cnn"] = Run("")
    assert "Exported" in made.register_best(result, predicted).reason
    assert asked["decision"] == LEAN and asked["image_size"] == 16
    answers = answered_by_hand(asked["model"], made.data_module().images("test"), LEAN)
    np.testing.assert_allclose(predicted.probabilities, answers, atol=1e-5)


class CountingModel(nn.Module):
    """Remembers how many maps each call brought."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(tuple(images.shape))
        return torch.arange(9.0).expand(len(images), 9)


@pytest.mark.parametrize("views", [1, 8])
def test_the_latency_of_an_answer_counts_all_the_views_that_it_takes(views, trained, monkeypatch):
    made, model = as_trained(trained, tune_decision=True), CountingModel()
    monkeypatch.setattr(made, "load_model", lambda record: model)
    monkeypatch.setattr("waferlab.evaluation.inference._check_is_what_was_trained", lambda *_: None)
    monkeypatch.setattr("waferlab.evaluation.inference.choose_decision", lambda *_, **__: Decision(views=views))
    (result,), _ = made.evaluate([trained[1]])
    one_at_a_time = [shape for shape in model.calls if shape[0] <= 8]
    assert one_at_a_time and set(one_at_a_time) == {(views, 1, 16, 16)}
    assert result.latency_ms > 0

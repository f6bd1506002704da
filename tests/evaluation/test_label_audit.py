"""Promises about the audit of labels: it finds the share of wrong ones and the maps, and changes none."""

import sys

import numpy as np
import pytest

from waferlab.errors import ConfigError
from waferlab.evaluation import label_audit
from waferlab.evaluation.label_audit import MOST_BLOCKS, audit_labels, likeliest_wrong
from waferlab.evaluation.predictions import Predictions

NAMES = ("a", "b", "c")


def answers_on(*, flipped, seed=0, lots=60, maps_in_lot=50):
    """A good network on maps of which a share of class a is labelled b; and which those are."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(lots), maps_in_lot)
    true = rng.integers(0, 3, len(groups))
    wrong = (true == 0) & (rng.random(len(groups)) < flipped)
    logits = rng.standard_normal((len(groups), 3)) + 5 * np.eye(3)[true]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions(probabilities, np.where(wrong, 1, true), groups, NAMES), wrong, true


@pytest.mark.parametrize("seed", range(3))
def test_the_share_of_wrong_labels_lies_in_its_interval_and_the_wrong_maps_are_the_likeliest(seed):
    answers, wrong, _ = answers_on(flipped=0.1, seed=seed)
    audit = audit_labels(answers)
    low, high = audit["per_class"]["b"]["interval"]
    truth = wrong[answers.labels == 1].mean()  # about 0.1 / 1.1
    assert low <= truth <= high and high - low < 0.06
    assert audit["interval"][0] <= wrong.mean() <= audit["interval"][1]
    assert audit["per_class"]["b"]["as_published"] < 0.95 * audit["per_class"]["b"]["error_rate"]
    ((other, share), *_) = audit["per_class"]["b"]["really"]
    assert other == "a" and share == pytest.approx(truth, abs=0.03)
    found = likeliest_wrong(answers)
    assert wrong[found[:50]].all() and wrong[found].mean() > 0.9 and wrong[found].sum() > 0.85 * wrong.sum()
    assert np.abs(np.array(audit["joint"]).sum() - 1) < 1e-4
    assert audit["n_groups"] == 60 and "60 lots" in audit["interval_method"]


def test_a_perfect_classifier_is_scored_against_the_labels_as_they_are():
    from sklearn.metrics import accuracy_score, f1_score

    answers, _, true = answers_on(flipped=0.3)
    audit = audit_labels(answers)
    low, high = audit["perfect"]["macro_f1_interval"]
    macro_f1 = f1_score(answers.labels, true, average="macro")
    assert macro_f1 == pytest.approx(audit["perfect"]["macro_f1"], abs=0.01) and low <= macro_f1 <= high
    assert accuracy_score(answers.labels, true) == pytest.approx(audit["perfect"]["accuracy"], abs=0.01)
    each = f1_score(answers.labels, true, average=None)
    np.testing.assert_allclose([one["perfect_f1"] for one in audit["per_class"].values()], each, atol=0.015)


def test_right_labels_have_a_rate_near_zero_and_nothing_given_is_changed():
    answers, _, _ = answers_on(flipped=0)
    before = answers.labels.copy(), answers.probabilities.copy()
    audit, found = audit_labels(answers), likeliest_wrong(answers)
    assert audit["error_rate"] < 0.005 and audit["perfect"]["macro_f1"] > 0.995
    assert all(one["error_rate"] < 0.01 and one["interval"][0] < 0.005 for one in audit["per_class"].values())
    assert len(found) < 0.005 * len(answers.labels)
    np.testing.assert_array_equal(answers.labels, before[0])
    np.testing.assert_array_equal(answers.probabilities, before[1])


def test_a_class_of_one_lot_and_maps_of_one_lot_have_no_interval():
    answers, _, _ = answers_on(flipped=0.1, lots=8)
    kept = (answers.labels != 2) | (answers.groups == 3)
    some = Predictions(answers.probabilities[kept], answers.labels[kept], answers.groups[kept], NAMES)
    audit = audit_labels(some)
    assert audit["per_class"]["c"]["interval"] is None and audit["per_class"]["c"]["lots"] == 1
    assert audit["per_class"]["b"]["interval"] is not None
    alone = audit_labels(Predictions(some.probabilities, some.labels, np.zeros(len(some.labels), int), NAMES))
    assert alone["interval"] is None and alone["perfect"]["macro_f1_interval"] is None
    assert all(one["interval"] is None for one in alone["per_class"].values())


def test_very_many_lots_are_left_out_several_at_a_time():
    answers, wrong, _ = answers_on(flipped=0.1, lots=MOST_BLOCKS + 100, maps_in_lot=5)
    audit = audit_labels(answers)
    assert f"{MOST_BLOCKS} blocks of {MOST_BLOCKS + 100} lots" in audit["interval_method"]
    assert audit["interval"][0] <= wrong.mean() <= audit["interval"][1]


def test_without_cleanlab_a_sentence_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(ConfigError, match=r"extra `audit`: pip install '\.\[audit\]'"):
        audit_labels(answers_on(flipped=0, lots=2)[0])


@pytest.mark.parametrize("counts", [[10] * 10, [30, 30, 30, 10], [7, 3, 11]])
def test_where_no_label_looks_wrong_the_rate_is_none_and_the_interval_says_how_few_lots_there_are(counts):
    joint = np.diag(counts) / np.sum(counts)
    shares = label_audit._shares(joint)
    assert shares["error_rate"] == 0 and (shares["error_rates"] == 0).all()

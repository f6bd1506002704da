"""Promises about monitoring: no more false alarms than it says, and an alarm for each kind of change."""

from dataclasses import replace

import numpy as np
import pytest
from made_up_lots import make_reference, make_sample
from scipy.stats import binom, ks_2samp

from waferlab.monitoring.drift import ALARM, NO_ALARM, NO_VERDICT, SIGNALS, compare
from waferlab.monitoring.reference import Sample

BATCHES = 80


def most(rate, n=BATCHES):
    """So many of n are exceeded once in a thousand times."""
    return binom.ppf(0.999, n, rate)


def compared(seed, *, lots=10, reference=None, permutations=99, **batch):
    rng = np.random.default_rng(seed)
    return compare(
        make_reference(rng, 24, **(reference or {})), make_sample(rng, lots, **batch)[0],
        permutations=permutations, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "batch"),
    [({}, {}), ({"size": 16}, {"size": 2}), ({"size": 12}, {"size": 1})],
    ids=["lots like those of validation", "smaller lots", "every map its own lot"],
)
def test_batches_like_the_validation_part_alarm_no_more_often_than_promised(reference, batch):
    found = [compared(seed, reference=reference, **batch) for seed in range(BATCHES)]
    assert sum(one.verdict == ALARM for one in found) <= most(0.05)
    for key in SIGNALS:
        assert sum(one.signal(key).p <= 0.05 for one in found) <= most(0.05)


def test_lots_and_not_maps_are_what_is_dealt():
    """Maps of these lots are much alike: taken one by one, they would alarm at most batches."""
    much = {"spread": 2.0, "size": 12}
    found = [compared(seed, reference=much, **much) for seed in range(40)]
    assert sum(one.verdict == ALARM for one in found) <= most(0.05, 40)
    by_maps = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ours, theirs = make_reference(rng, 24, **much).sample, make_sample(rng, 10, **much)[0]
        columns = zip(ours.probabilities.T, theirs.probabilities.T, strict=True)
        by_maps += min(ks_2samp(*pair).pvalue for pair in columns) < 0.05 / 3
    assert by_maps > 30


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("scores", {"mix": (0.9, 0.05, 0.05)}),
        ("features", {"look": 2.0}),
        ("class_mix", {"mix": (0.02, 0.96, 0.02)}),
        ("density", {"density": 0.2}),
        ("grids", {"grids": 1}),
        ("new_grids", {"grids": 0}),
    ],
)
def test_each_signal_alarms_for_its_change(key, change):
    found = compared(3, lots=15, permutations=499, **change)
    assert found.signal(key).alarms and found.verdict == ALARM
    assert found.signal(key).effect > found.signal(key).usual
    assert found.signal(key).p_corrected >= found.signal(key).p >= 1 / 500


def test_what_has_not_changed_does_not_alarm():
    found = compared(4, lots=15, permutations=499, density=0.25)
    assert [one.key for one in found.signals if one.alarms] == ["density"]


def test_the_furthest_lot_is_named_first():
    rng = np.random.default_rng(0)
    batch = make_sample(rng, 8)[0]
    batch.features[batch.lots == 5] += 4
    lot, distance, beyond = compare(make_reference(rng, 24), batch, permutations=9).odd_lots[0]
    assert lot == 5 and distance > 0 and beyond == 1


@pytest.mark.parametrize("few", [1, 4])
def test_too_few_lots_get_no_verdict(few):
    found = compared(0, lots=few, size=30, density=0.9)
    assert found.verdict == NO_VERDICT
    assert all(one.p is None and not one.alarms for one in found.signals)
    assert f"the batch has {few}" in found.caveats[0]


def test_five_lots_suffice_for_an_alarm():
    assert compared(0, lots=5, density=0.5, permutations=999).verdict == ALARM


def test_maps_without_lots_come_with_a_caveat():
    found = compared(1, lots=60, size=1)
    assert found.verdict in (ALARM, NO_ALARM)
    assert "each counts as a lot of its own" in found.caveats[0]
    assert not compared(1).caveats
    rng = np.random.default_rng(0)
    reference, batch = make_reference(rng, 60, size=1), make_sample(rng, 10)[0]
    assert "each counts as a lot of its own" in compare(reference, batch, permutations=9, seed=0).caveats[0]
    four = replace(reference.sample, weights=np.full(len(reference.sample), 4.0))  # maps a lot, of which one was kept
    assert not compare(replace(reference, sample=four), batch, permutations=9, seed=0).caveats


def test_the_same_batch_has_the_same_answer_in_whatever_order_its_maps_come():
    rng = np.random.default_rng(0)
    reference, batch = make_reference(rng, 24), make_sample(rng, 10)[0]
    first = compare(reference, batch, permutations=199)
    turned = compare(reference, batch.select(np.argsort(-batch.lots, kind="stable")), permutations=199)
    for one, other in zip(first.signals, turned.signals, strict=True):
        assert one.effect == pytest.approx(other.effect, abs=0.05)
    assert first == compare(reference, batch, permutations=199)


def test_answers_of_another_model_are_refused():
    rng = np.random.default_rng(0)
    reference, batch = make_reference(rng, 24), make_sample(rng, 10)[0]
    other = Sample(batch.probabilities, batch.features[:, :3], batch.lots, batch.density, batch.grids)
    with pytest.raises(ValueError, match="features of 3 columns against 5"):
        compare(reference, other)

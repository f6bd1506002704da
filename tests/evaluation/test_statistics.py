"""Promises about differences between trainings: corrected for their number, as wide as the data are few."""

import statistics

import numpy as np
import pytest
from scipy import stats

from waferlab.evaluation.statistics import holm_factors, mean_interval, mean_score, paired_differences


def make_records(scores):
    """Records of a series from the macro F1 of each variant, one a seed."""
    return [
        {"variant": name, "seed": seed, "macro_f1": score, "maps": {"train": 400, "test": 100}}
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_holm_corrects_as_in_a_worked_example():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2 and 0.04, which is raised to the 0.06 before it.
    assert holm_factors([0.01, 0.04, 0.03, 0.005]) == pytest.approx([3, 0.06 / 0.04, 2, 4])
    assert holm_factors([None, 0.5, 0.6]) == pytest.approx([None, 2, 1 / 0.6])
    assert holm_factors([0.5, 0.6, 0.7]) == pytest.approx([3, 1.5 / 0.6, 1.5 / 0.7])  # not cut off where p would be 1
    assert holm_factors([0.0, 0.02, 0.0]) == [3, 1, 2]
    assert holm_factors([]) == []


def test_intervals_of_differences_are_corrected_as_their_p_values():
    """Worked by hand: three differences against a reference, so factors 3, 2 and 1 from the smallest p on."""
    gains = {"clear": [0.05, 0.06, 0.07, 0.06], "likely": [0.03, 0.05, 0.03, 0.06], "nothing": [0.03, -0.02, 0.01, 0.0]}
    records = make_records({"reference": [0.8] * 4} | {k: [0.8 + gain for gain in v] for k, v in gains.items()})
    rows = {row["a"]: row for row in paired_differences(records, [(name, "reference") for name in gains])}
    for factor, (name, gain) in zip((3, 2, 1), gains.items(), strict=True):
        error = statistics.stdev(gain) * (1 / 4 + 100 / 400) ** 0.5
        p = 2 * stats.t.sf(abs(statistics.mean(gain)) / error, 3)
        half = stats.t.ppf(1 - 0.05 / factor / 2, 3) * error
        row = rows[name]
        assert (row["p"], row["p_corrected"]) == pytest.approx((p, factor * p))
        assert row["level"] == pytest.approx(1 - 0.05 / factor)
        assert row["interval"] == pytest.approx([statistics.mean(gain) - half, statistics.mean(gain) + half])
    plain = mean_interval(gains["likely"], test_over_train=0.25)["interval"]
    assert plain[0] > 0 > rows["likely"]["interval"][0], "95% would leave out 0 beside a corrected p of 0.05 or more"


def test_an_interval_leaves_out_0_exactly_where_the_corrected_p_is_significant():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        scores = {k: (0.8 + rng.uniform(0, 0.05) + 0.02 * rng.standard_normal(4)).tolist() for k in "abcd"}
        for row in paired_differences(make_records(scores), [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c")]):
            assert (row["interval"][0] > 0 or row["interval"][1] < 0) is row["significant"]
            assert row["significant"] is (row["p_corrected"] < 0.05)
            assert row["p"] <= row["p_corrected"] <= 1
            seen.add((row["significant"], row["p"] < 0.05))
    assert seen == {(True, True), (False, True), (False, False)}


def test_differences_without_spread_or_of_one_seed_are_reported_as_they_are():
    records = make_records({"a": [0.5, 0.75], "b": [0.25, 0.5], "c": [0.5, 0.75], "d": [0.4]})
    ahead, equal, single = paired_differences(records, [("a", "b"), ("a", "c"), ("a", "d")])
    assert (ahead["p"], ahead["p_corrected"], ahead["significant"]) == (0, 0, True)
    assert ahead["interval"] == [0.25, 0.25]
    assert (equal["p"], equal["p_corrected"], equal["interval"], equal["significant"]) == (1, 1, [0, 0], False)
    assert single["difference"] == pytest.approx(0.1)
    assert [single[key] for key in ("interval", "level", "p", "p_corrected")] == [None] * 4
    assert single["significant"] is False


def test_intervals_are_wider_than_for_independent_scores():
    values = [0.70, 0.74, 0.71, 0.77, 0.73]
    found = mean_interval(values, test_over_train=0.2)
    naive = stats.t.interval(0.95, 4, statistics.mean(values), stats.sem(values))
    corrected = (0.2 * 5 + 1) ** 0.5
    assert found["interval"][1] - found["mean"] == pytest.approx(corrected * (naive[1] - found["mean"]))
    assert mean_interval(values, test_over_train=0.0)["p"] == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert mean_interval([0.5], test_over_train=0.2) == {"mean": 0.5, "std": None, "interval": None, "p": None}


def test_the_interval_of_a_mean_score_does_not_leave_the_scores_that_there_are():
    low, high = mean_score([0.85, 0.99, 0.95], test_over_train=0.2)["interval"]
    assert high == 1 and low == mean_interval([0.85, 0.99, 0.95], test_over_train=0.2)["interval"][0]
    assert mean_score([0.01, 0.2, 0.02], test_over_train=0.2)["interval"][0] == 0
    assert mean_score([0.5], test_over_train=0.2) == {"mean": 0.5, "std": None, "interval": None}

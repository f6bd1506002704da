"""Means over seeds and paired differences, with intervals that hold what they promise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

INTERVAL_METHOD = (
    "95% t interval of one mean over seeds, the variance corrected for training parts that overlap (Nadeau & Bengio "
    "2003)"
)
DIFFERENCE_METHOD = (
    "paired over seeds, t interval with the variance corrected for overlapping training parts (Nadeau & Bengio 2003); "
    "p values and intervals corrected for the number of comparisons (Holm 1979), so that an interval leaves out 0 "
    "where its corrected p is below 0.05"
)
SIGNIFICANCE = 0.05  # of a corrected p value; an interval that is not corrected has the level 1 - SIGNIFICANCE


def mean_interval(
    values: Sequence[float], *, test_over_train: float, level: float = 1 - SIGNIFICANCE
) -> dict[str, Any]:
    """Mean, standard deviation, interval of the mean and the two-sided p value against 0.

    Seeds share most of their training maps, so their scores are not independent: the variance of the mean is taken as
    (1/n + test/train) times the variance over seeds (Nadeau & Bengio 2003, "Inference for the generalization error",
    Machine Learning 52). Without that, intervals come out too narrow.

    Args:
        values: one a seed.
        test_over_train: number of test maps over number of training maps.
        level: of the interval, between 0 and 1.

    Returns:
        mean, std, interval, p; all but the mean None for a single value.
    """
    from scipy import stats

    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return {"mean": mean, "std": None, "interval": None, "p": None}
    deviation = statistics.stdev(values)
    error = deviation * (1 / n + test_over_train) ** 0.5
    half = float(stats.t.isf((1 - level) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return {"mean": mean, "std": deviation, "interval": [mean - half, mean + half], "p": p}


def mean_score(scores: Sequence[float], *, test_over_train: float) -> dict[str, Any]:
    """Mean, standard deviation and interval of scores between 0 and 1, which the interval does not leave.

    Returns:
        mean, std, interval, as of `mean_interval`.
    """
    found = mean_interval(scores, test_over_train=test_over_train)
    inside = found["interval"] and [max(0.0, found["interval"][0]), min(1.0, found["interval"][1])]
    return {"mean": found["mean"], "std": found["std"], "interval": inside}


def holm_factors(p_values: Sequence[float | None]) -> list[float | None]:
    """What each p value is multiplied by to correct for their number (Holm 1979, Scand. J. Statist. 6).

    The smallest of m is multiplied by m, the next by m - 1, and so on, or by more where the corrected value would be
    lower than that of a smaller p value. None stays None.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    factors: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, (len(known) - rank) * p)
        factors[i] = highest / p if p > 0 else float(len(known) - rank)
    return factors


def scores_by_seed(records: Sequence[Mapping[str, Any]], variant: str) -> dict[int, float]:
    """The test macro F1 of a variant, by seed."""
    return {r["seed"]: r["macro_f1"] for r in records if r["variant"] == variant}


def test_over_train(records: Sequence[Mapping[str, Any]]) -> float:
    """Number of test maps over number of training maps, the mean over records."""
    return statistics.mean(r["maps"]["test"] / r["maps"]["train"] for r in records)


def paired_differences(records: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each pair of variants, the first minus the second over seeds, corrected for the number of pairs.

    P values by Holm's method, and the intervals as the p values: a p value that is multiplied by f has an interval of
    the level 1 - 0.05 / f. So an interval leaves out 0 exactly where the corrected p value is below 0.05.

    Returns:
        For each pair: a, b, difference (the mean), interval and its level, p, p_corrected, significant. With one seed
        in common interval, level and p values are None.
    """
    ratio = test_over_train(records)
    differences = [_paired(scores_by_seed(records, a), scores_by_seed(records, b)) for a, b in pairs]
    tests = [mean_interval(values, test_over_train=ratio)["p"] for values in differences]
    rows = []
    for (a, b), values, p, factor in zip(pairs, differences, tests, holm_factors(tests), strict=True):
        level = 1 - SIGNIFICANCE / (factor or 1)
        found = mean_interval(values, test_over_train=ratio, level=level)
        corrected = None if factor is None else min(1.0, factor * p)
        rows.append(
            {
                "a": a,
                "b": b,
                "difference": found["mean"],
                "interval": found["interval"],
                "level": None if factor is None else level,
                "p": p,
                "p_corrected": corrected,
                "significant": corrected is not None and corrected < SIGNIFICANCE,
            }
        )
    return rows


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """The differences over the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

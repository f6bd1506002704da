"""Measures how often the product's 95% intervals hold the truth, on simulated data sets of which the truth is known.

    python benchmarks/interval_coverage.py --output benchmarks/results/interval_coverage.json

A data set is what two models say about maps in lots: lots hold one or two classes each, or a mixture; how good a model
is varies from lot to lot and from class to class within a lot; what a lot's maps are taken for is particular to the
lot; the two models err on much the same maps. Each data set is scored by `compute_metrics` and
`compare_macro_f1` themselves, and by the method that they replaced: percentiles of a bootstrap over lots in
which a resample without a class scores 0 for it. An interval counts if it holds the score of a very large sample of the
same process. Data sets that lack a class are drawn again, since the product's split puts each class into the test part;
a class that only one lot holds has no interval of its own and counts in none of the figures for classes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import write_record

from waferlab.data.maps import CLASS_NAMES
from waferlab.evaluation.metrics import _lot_statistics, _scores, compare_macro_f1, compute_metrics
from waferlab.evaluation.predictions import Predictions

MEASURES = ("compute_metrics", "compare_macro_f1")
C = len(CLASS_NAMES)
SCORES = ("macro_f1", "accuracy", "balanced_accuracy", "expected_calibration_error")
EQUAL = (1 / C,) * C
# WM-811K: many none, few Near-full and Donut; in the order of CLASS_NAMES, as all that follows.
RARE = (0.10, 0.02, 0.12, 0.18, 0.09, 0.012, 0.03, 0.05, 0.398)
SKILL = (4.0, 2.5, 3.0, 4.0, 1.8, 4.5, 2.8, 1.5, 4.5)  # log odds of a right answer on a map of middle difficulty
# What wrong answers are, by true class: about as the models of benchmarks/results/production.json confuse the classes.
CONFUSIONS = np.array(
    [
        [0, 1, 1, 0, 7, 0, 0, 1, 5],
        [2, 0, 0, 1, 6, 0, 2, 1, 1],
        [1, 0, 0, 7, 8, 0, 1, 1, 14],
        [1, 0, 20, 0, 1, 0, 4, 0, 1],
        [9, 3, 25, 1, 0, 0, 1, 12, 18],
        [0, 0, 0, 0, 0, 0, 1, 0, 0],
        [1, 2, 2, 1, 1, 2, 0, 0, 1],
        [1, 0, 3, 3, 14, 0, 0, 0, 18],
        [6, 0, 40, 25, 8, 0, 0, 12, 0],
    ],
    dtype=float,
)
LOT_SPREAD, CLASS_IN_LOT_SPREAD, DIFFICULTY = 0.7, 0.9, 1.5  # standard deviations in log odds
ALIKE = 0.7  # correlation of the two models' lot effects
OVERCONFIDENCE = 1.2  # by which log odds are stretched in what the models say of themselves
N_RESAMPLES = 1000


@dataclass(frozen=True)
class Setting:
    """A kind of test part.

    Attributes:
        name: for the record.
        lots: number of lots.
        maps: in a lot, on average.
        shares: of each class.
        mixed: lots hold several classes, as runs of rows of WM-811K do; otherwise one or two.
        scored: whether scores are measured too, not just differences.
    """

    name: str
    lots: int
    maps: int
    shares: tuple[float, ...] = EQUAL
    mixed: bool = False
    scored: bool = True

    def process(self) -> Setting:
        """What the truth depends on: all but the number of lots."""
        return replace(self, name="", lots=1, scored=True)


SETTINGS = (
    *(Setting(f"{n} lots of 16 maps, equal classes", n, 16, scored=False) for n in (6, 8, 10)),
    Setting("12 lots of 16 maps, equal classes", 12, 16),
    Setting("18 lots of 11 maps, equal classes", 18, 11),
    Setting("30 lots of 16 maps, equal classes", 30, 16),
    Setting("48 lots of 140 maps, rare classes, one or two in a lot", 48, 140, RARE),
    Setting("48 lots of 140 maps, rare classes, mixed lots", 48, 140, RARE, mixed=True),
    Setting("200 lots of 16 maps, rare classes, one or two in a lot", 200, 16, RARE),
)
DIFFERENCES = (0.02, 0.0)  # true differences in macro F1


# The simulated models


def draw_maps(rng: np.random.Generator, setting: Setting, n_lots: int) -> tuple[np.ndarray, np.ndarray]:
    """Lot and class of each map, int64 [N]."""
    sizes = np.maximum(2, rng.gamma(8, setting.maps / 8, size=n_lots).round().astype(int))
    lot = np.repeat(np.arange(n_lots), sizes)
    if setting.mixed:
        mix = rng.gamma(np.array(setting.shares) * 2.5, size=(n_lots, C)) + 1e-12  # a Dirichlet draw for each lot
    else:
        mix = np.zeros((n_lots, C))
        part = rng.random(n_lots)
        for share in (part, 1 - part):
            mix[np.arange(n_lots), rng.choice(C, size=n_lots, p=normalised(setting.shares))] += share
    return lot, pick(rng, normalised(mix)[lot])


def normalised(weights: np.ndarray | tuple[float, ...]) -> np.ndarray:
    weights = np.asarray(weights)
    return weights / weights.sum(axis=-1, keepdims=True)


def pick(rng: np.random.Generator, shares: np.ndarray) -> np.ndarray:
    """A column of each row of shares [N, C], int64 [N]; never one whose share is 0."""
    return (rng.random((len(shares), 1)) >= shares.cumsum(axis=1)[:, :-1]).sum(axis=1)


def draw_models(
    rng: np.random.Generator, lot: np.ndarray, labels: np.ndarray, lead: float
) -> tuple[Predictions, Predictions]:
    """What two models say about maps of these lots and classes; the first is better by `lead` in log odds."""
    n_lots = lot[-1] + 1
    skill = np.array(SKILL)[labels] + DIFFICULTY * rng.standard_normal(len(lot))  # maps are hard for both models
    common = rng.standard_normal((n_lots, C + 1))
    wrong_for = rng.gamma(np.maximum(3 * normalised(CONFUSIONS), 1e-9), size=(n_lots, C, C)) + 1e-12
    wrong_for = normalised(np.where(CONFUSIONS > 0, wrong_for, 0))[lot, labels]
    models = []
    for ahead in (lead, 0.0):
        effects = ALIKE**0.5 * common + (1 - ALIKE) ** 0.5 * rng.standard_normal(common.shape)
        by_lot = LOT_SPREAD * effects[lot, C] + CLASS_IN_LOT_SPREAD * effects[lot, labels]
        right = rng.random(len(lot)) < 1 / (1 + np.exp(-(skill + ahead + by_lot)))
        confidence = np.clip(1 / (1 + np.exp(-OVERCONFIDENCE * (skill + ahead))), 0.3, 0.999)
        probabilities = np.repeat((1 - confidence[:, None]) / (C - 1), C, axis=1)
        probabilities[np.arange(len(lot)), np.where(right, labels, pick(rng, wrong_for))] = confidence
        models.append(Predictions(probabilities, labels, lot, CLASS_NAMES))
    return models[0], models[1]


def data_sets(setting: Setting, lead: float, *, repeats: int, seed: int) -> Iterator[tuple[Predictions, ...]]:
    """Pairs of models on maps of every class."""
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        lot, labels = draw_maps(rng, setting, setting.lots)
        while len(np.unique(labels)) < C:
            lot, labels = draw_maps(rng, setting, setting.lots)
        yield draw_models(rng, lot, labels, lead)


@functools.cache
def true_scores(process: Setting, lead: float, n_lots: int) -> tuple[dict[str, np.ndarray], ...]:
    """What both models score on very many lots, drawn a thousand at a time."""
    rng, sums = np.random.default_rng(1), [[0, 0], [0, 0]]
    for start in range(0, n_lots, 1000):
        maps = draw_maps(rng, process, min(1000, n_lots - start))
        for model, predictions in enumerate(draw_models(rng, *maps, lead)):
            for kind, of_lots in enumerate(_lot_statistics(predictions)):
                sums[model][kind] = sums[model][kind] + of_lots.sum(axis=0)
    return tuple(_scores(*of_model) for of_model in sums)


def true_difference(setting: Setting, lead: float, n_lots: int) -> float:
    if lead == 0:
        return 0.0  # the two models are exchangeable
    new, old = true_scores(setting.process(), lead, n_lots)
    return float(new["macro_f1"] - old["macro_f1"])


def lead_for(setting: Setting, difference: float, n_lots: int) -> float:
    """The lead in log odds whose true difference in macro F1 is about `difference`."""
    if difference == 0:
        return 0.0
    guess = 0.25
    for _ in range(2):  # nearly proportional
        guess *= difference / true_difference(setting, guess, n_lots // 4)
    return guess


# Coverage


def percentile_intervals(*models: Predictions, seed: int) -> list[dict[str, Any]]:
    """The former method: 2.5 to 97.5% of bootstrap resamples of lots, in each of which an absent class has F1 0.

    The resamples are the same for all models; last comes the difference of the first two, if there are two.
    """
    found, samples = [], []
    for predictions in models:
        confusion, gaps = _lot_statistics(predictions)
        n_lots, rng = len(confusion), np.random.default_rng(seed)
        drawn = rng.integers(n_lots, size=(N_RESAMPLES, n_lots)) + np.arange(N_RESAMPLES)[:, None] * n_lots
        weights = np.bincount(drawn.ravel(), minlength=N_RESAMPLES * n_lots).reshape(N_RESAMPLES, n_lots).astype(float)
        sums = weights @ confusion.reshape(n_lots, -1)
        scores = _scores(sums.reshape(-1, C, C), weights @ gaps)
        scores["macro_f1"] = scores["f1"].mean(axis=-1)
        found.append({name: np.percentile(scores[name], [2.5, 97.5], axis=0).T for name in (*SCORES, "f1")})
        samples.append(scores["macro_f1"])
    if len(samples) == 2:
        found.append({"difference": np.percentile(samples[0] - samples[1], [2.5, 97.5])})
    return found


def rows_of_scores(setting: Setting, *, repeats: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Intervals of all scores and classes, [R, 4 + C, 2], by the product and by percentiles; NaN where there is none.

    Last, the share of data sets in which some class lives in one lot only.
    """
    ours, theirs, alone = [], [], []
    for number, (_, model) in enumerate(data_sets(setting, 0.0, repeats=repeats, seed=seed)):
        metrics = compute_metrics(model)
        of_classes = [row["f1_interval"] or (np.nan, np.nan) for row in metrics["per_class"].values()]
        ours.append([*(metrics["intervals"][name] for name in SCORES), *of_classes])
        (old,) = percentile_intervals(model, seed=number)
        old["f1"][np.isnan(np.array(of_classes))] = np.nan
        theirs.append([*(old[name] for name in SCORES), *old["f1"]])
        alone.append(np.isnan(np.array(of_classes)).any())
    return np.array(ours), np.array(theirs), float(np.mean(alone))


def rows_of_differences(setting: Setting, lead: float, *, repeats: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of the difference in macro F1, [R, 1, 2], by the product and by percentiles."""
    ours, theirs = [], []
    for number, pair in enumerate(data_sets(setting, lead, repeats=repeats, seed=seed)):
        ours.append([compare_macro_f1(*pair)["interval"]])
        theirs.append([percentile_intervals(*pair, seed=number)[-1]["difference"]])
    return np.array(ours), np.array(theirs)


def tally(intervals: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Coverage of intervals [R, K, 2] of truths [K]: its standard error over data sets, misses and mean width."""
    low, high = intervals[..., 0], intervals[..., 1]
    known = ~np.isnan(low)
    held = np.where(known, (low <= truth) & (truth <= high), np.nan)
    rows = held[known.any(axis=1)]
    error = np.nanmean(rows, axis=1).std() / len(rows) ** 0.5
    return {
        "coverage": round(float(np.nanmean(held)), 4),
        "standard_error": round(float(error), 4),
        "truth_above": round(float((truth > high)[known].mean()), 4),
        "truth_below": round(float((truth < low)[known].mean()), 4),
        "mean_width": round(float((high - low)[known].mean()), 4),
    }


def coverage_of_scores(setting: Setting, *, repeats: int, seed: int, truth_lots: int) -> dict[str, Any]:
    """Of the four scores and of the classes' F1: all classes together, and the class that is covered worst."""
    *methods, alone = rows_of_scores(setting, repeats=repeats, seed=seed)
    _, scores = true_scores(setting.process(), 0.0, truth_lots)
    truth = np.array([*(scores[name] for name in SCORES), *scores["f1"]])
    found: dict[str, Any] = {}
    for index, name in enumerate(SCORES):
        found[name] = {"truth": round(float(truth[index]), 4)}
        for method, rows in zip(("product", "percentile"), methods, strict=True):
            found[name][method] = tally(rows[:, [index]], truth[[index]])
    found["class_f1"] = {"data_sets_with_a_class_in_one_lot": round(alone, 3)}
    for method, rows in zip(("product", "percentile"), methods, strict=True):
        of_class = {
            name: tally(rows[:, [index]], truth[[index]])
            for index, name in enumerate(CLASS_NAMES, len(SCORES))
            if not np.isnan(rows[:, index]).all()
        }
        worst = min(of_class, key=lambda name: of_class[name]["coverage"])
        found["class_f1"][method] = tally(rows[:, len(SCORES) :], truth[len(SCORES) :]) | {
            "worst_class": {"class": worst, **of_class[worst]}
        }
    return found


def coverage_of_differences(
    setting: Setting, difference: float, *, repeats: int, seed: int, truth_lots: int
) -> dict[str, Any]:
    """Of the difference in macro F1 between two models, and how often its interval lies above 0."""
    lead = lead_for(setting, difference, truth_lots)
    truth = true_difference(setting, lead, truth_lots)
    found: dict[str, Any] = {"truth": round(truth, 4)}
    methods = rows_of_differences(setting, lead, repeats=repeats, seed=seed)
    for method, rows in zip(("product", "percentile"), methods, strict=True):
        above = round(float((rows[:, 0, 0] > 0).mean()), 4)
        found[method] = tally(rows, np.array([truth])) | {"interval_above_0": above}
    return found


def fewest_lots(settings: list[dict[str, Any]], promise: float = 0.9) -> int | None:
    """The smallest number of lots from which on all measured differences are covered as promised."""
    worst: dict[int, float] = {}
    for setting in settings:
        lowest = min(d["product"]["coverage"] for d in setting["differences"])
        worst[setting["lots"]] = min(lowest, worst.get(setting["lots"], 1.0))
    kept = itertools.takewhile(lambda lots: worst[lots] >= promise, sorted(worst, reverse=True))
    return min(kept, default=None)


def line_of(what: str, found: Mapping[str, Any]) -> str:
    texts = [
        f"{method} {found[method]['coverage']:.3f} ± {found[method]['standard_error']:.3f}, truth above "
        f"{found[method]['truth_above']:.3f}, below {found[method]['truth_below']:.3f}, width "
        f"{found[method]['mean_width']:.3f}"
        for method in ("product", "percentile")
    ]
    return f"  {what:28s} {'; '.join(texts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="data sets in each setting")
    parser.add_argument("--lots", type=int, nargs="+", help="only the settings with so many lots")
    parser.add_argument("--truth-lots", type=int, default=50_000, help="lots from which the truth is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the record to write; printed without it")
    arguments = parser.parse_args()
    common = {"repeats": arguments.repeats, "seed": arguments.seed, "truth_lots": arguments.truth_lots}
    settings = []
    for setting in SETTINGS:
        if arguments.lots and setting.lots not in arguments.lots:
            continue
        print(setting.name, flush=True)
        row: dict[str, Any] = {"name": setting.name, "lots": setting.lots, "maps_per_lot": setting.maps}
        if setting.scored:
            row["scores"] = coverage_of_scores(setting, **common)
            for name, found in row["scores"].items():
                print(line_of(name, found), flush=True)
        row["differences"] = [coverage_of_differences(setting, difference, **common) for difference in DIFFERENCES]
        for found in row["differences"]:
            print(line_of(f"difference of {found['truth']:.3f}", found), flush=True)
        settings.append(row)
    record = {
        "repeats": arguments.repeats,
        "seed": arguments.seed,
        "truth_lots": arguments.truth_lots,
        "resamples_of_percentile": N_RESAMPLES,
        "fewest_lots_with_differences_covered_in_90_percent": fewest_lots(settings),
        "settings": settings,
    }
    write_record(
        arguments.output,
        record,
        measures=MEASURES,
        repeats=f"{arguments.repeats:,} data sets",
        weights=None,
        search=None,
    )


if __name__ == "__main__":
    main()

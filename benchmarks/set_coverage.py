"""Measures how often prediction sets hold the true class on lots that nobody has seen: simulated ones, and real ones.

    python benchmarks/set_coverage.py --output benchmarks/results/set_coverage.json
    python benchmarks/set_coverage.py --model checkpoints/production/lightning_cnn/model.onnx --data wm811k.npz \
        --output benchmarks/results/set_coverage.json

Simulated: the log odds that a model gives the true class of a map are normal, with a part that all maps of a lot share;
lots differ in size. Sets are fitted on so many lots by `PredictionSets` and, beside it, by pooled split conformal
prediction, which is the same with each map as a lot of its own. How often a map of a new lot is then held is known
exactly, from the normal distribution, so that only the fits vary.

Real (with --model): the sets fitted on the validation part and counted on the test part, class by class. Then the lots
of both parts are divided at random into halves, one to fit and one to count on, again and again; of each lot the mean
over the divisions in which it was counted on, and of a class the mean over its lots, with the interval of
`share_interval` over them. Divisions in which a class has too few lots for a promise do not count for it. The network,
its epoch and its decision were chosen on the validation part, whose answers are therefore a little better than others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from measure import write_record
from provenance import SPLIT

from waferlab.data.maps import CLASS_NAMES
from waferlab.evaluation.conformal import MARGIN, PredictionSets, evaluate_sets
from waferlab.evaluation.metrics import share_interval
from waferlab.evaluation.predictions import Predictions

MEASURES = ("PredictionSets", "evaluate_sets")
COVERAGE = 0.9
LOTS = (8, 9, 15, 30, 100)
MAPS_A_LOT = 20  # on average
CORRELATION = 0.5  # of the log odds of two maps of a lot
MEAN_LOG_ODDS = 3.0  # of the true class; standard deviation 1.5
SPREAD = 1.5


# Simulated lots


def simulate(lots: int, correlation: float, *, repeats: int, seed: int) -> dict[str, Any]:
    """True coverage of many fits on so many lots, by lots and pooled."""
    rng, coverages = np.random.default_rng(seed), {"by_lot": [], "pooled": []}
    for _ in range(repeats):
        sizes = np.maximum(1, rng.gamma(2, MAPS_A_LOT / 2, size=lots).round().astype(int))
        lot = np.repeat(np.arange(lots), sizes)
        normal = correlation**0.5 * rng.standard_normal(lots)[lot]
        normal += (1 - correlation) ** 0.5 * rng.standard_normal(len(lot))
        right = 1 / (1 + np.exp(-(MEAN_LOG_ODDS + SPREAD * normal)))
        answers = np.column_stack([right, 1 - right])
        for way, groups in (("by_lot", lot), ("pooled", np.arange(len(lot)))):
            sets = PredictionSets.fit(Predictions(answers, np.zeros(len(lot), int), groups, ("true", "other")))
            coverages[way].append(true_coverage(float(sets.floors_at(COVERAGE)[0])))
    fits = {way: of_fits(np.array(found)) for way, found in coverages.items()}
    return {"lots": lots, "correlation": correlation, "promised": sets_promise(lots), **fits}


def sets_promise(lots: int) -> bool:
    return bool(PredictionSets(("true",), (lots,), ()).promised(COVERAGE)[0])


def true_coverage(floor: float) -> float:
    """How often a map of a new lot has its true class in the set."""
    least = (1 - MARGIN) * floor
    return 1 - NormalDist(MEAN_LOG_ODDS, SPREAD).cdf(float(np.log(least / (1 - least))))


def of_fits(coverages: np.ndarray) -> dict[str, float]:
    return {
        "coverage": round(float(coverages.mean()), 4),
        "standard_error": round(float(coverages.std() / len(coverages) ** 0.5), 4),
        "of_the_worst_5_percent": round(float(np.quantile(coverages, 0.05)), 4),
    }


# Real lots


def answers_of(model: Path, data: Path, *, seed: int) -> dict[str, Predictions]:
    """What an exported model says of the validation and the test part of the data that it was trained on."""
    from waferlab.data.reading import load_wafer_maps
    from waferlab.data.splitting import split_by_lot
    from waferlab.deployment.predictor import Predictor

    predictor, maps = Predictor(model), load_wafer_maps(data, seed=seed)
    split = split_by_lot(maps, seed=seed)
    if predictor.about.get("split") != split.fingerprint:
        raise SystemExit(
            f"{model} was trained on the split {predictor.about.get('split')}, seed {seed} of {data.name} gives "
            f"{split.fingerprint}: it may have seen these maps. Give the data and the seed of its training."
        )
    names, found = np.array(predictor.class_names), {}
    for part in ("validation", "test"):
        indices = split.parts()[part]
        indices = indices[np.isin(np.array(CLASS_NAMES)[maps.labels[indices]], names)]
        labels = [predictor.class_names.index(CLASS_NAMES[label]) for label in maps.labels[indices]]
        said = predictor.probabilities([maps[i] for i in indices])
        found[part] = Predictions(said, np.array(labels), maps.groups[indices], predictor.class_names)
    return found


def divided_again(answers: dict[str, Predictions], *, divisions: int, seed: int) -> dict[str, Any]:
    """Coverage of each class over random halves of the lots of both parts."""
    both = [answers["validation"], answers["test"]]
    every = Predictions(
        np.concatenate([part.probabilities for part in both]), np.concatenate([part.labels for part in both]),
        np.concatenate([part.groups for part in both]), both[0].class_names,
    )  # fmt: skip
    lots, lot = np.unique(every.groups, return_inverse=True)
    n_classes, rng = len(every.class_names), np.random.default_rng(seed)
    cells = lot * n_classes + every.labels
    maps_in = np.bincount(cells, minlength=len(lots) * n_classes).reshape(len(lots), n_classes)
    covered, counted, fitted = np.zeros(maps_in.shape), np.zeros(maps_in.shape), []
    for _ in range(divisions):
        in_fit = np.isin(np.arange(len(lots)), rng.permutation(len(lots))[: len(lots) // 2])
        sets = PredictionSets.fit(some_of(every, in_fit[lot]))
        held = sets.sets(every.probabilities, COVERAGE)[np.arange(len(lot)), every.labels]
        of_cell = np.bincount(cells, weights=held, minlength=maps_in.size).reshape(maps_in.shape)
        counts_here = ~in_fit[:, None] & (maps_in > 0) & sets.promised(COVERAGE)
        covered += np.where(counts_here, of_cell / np.maximum(maps_in, 1), 0)
        counted += counts_here
        fitted.append(np.where(sets.promised(COVERAGE), sets.lots, np.nan))
    return {
        name: of_lots(covered[:, label], counted[:, label]) | {"fits": int((~np.isnan(fits)).sum())}
        for label, (name, fits) in enumerate(zip(every.class_names, np.array(fitted).T, strict=True))
    }


def some_of(answers: Predictions, chosen: np.ndarray) -> Predictions:
    return Predictions(
        answers.probabilities[chosen], answers.labels[chosen], answers.groups[chosen], answers.class_names
    )


def of_lots(covered: np.ndarray, counted: np.ndarray) -> dict[str, Any]:
    """Mean over lots of what each lot's mean over divisions is, and its interval."""
    shares = covered[counted > 0] / counted[counted > 0]
    return {
        "lots": len(shares),
        "coverage": round(float(shares.mean()), 4) if len(shares) else None,
        "interval": [round(end, 4) for end in share_interval(shares)] if len(shares) > 1 else None,
    }


def real(model: Path, data: Path, *, divisions: int, seed: int) -> dict[str, Any]:
    answers = answers_of(model, data, seed=seed)
    sets = PredictionSets.fit(answers["validation"])
    return {
        "data": data.name,
        "seed": seed,
        "divisions": divisions,
        "test": evaluate_sets(sets, answers["test"], COVERAGE),
        "divided_again": divided_again(answers, divisions=divisions, seed=seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000, help="simulated fits of each number of lots")
    parser.add_argument("--lots", type=int, nargs="+", default=LOTS)
    parser.add_argument("--model", type=Path, help="exported file whose sets are counted on real lots, too")
    parser.add_argument("--data", type=Path, help="the maps that the model was trained on")
    parser.add_argument("--divisions", type=int, default=200, help="of the real lots into halves")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation, and of the model's split")
    parser.add_argument("--output", type=Path, help="the record to write; printed without it")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data belong together: give both, or neither for the simulation alone.")
    simulated = []
    for lots in arguments.lots:
        row = simulate(lots, CORRELATION, repeats=arguments.repeats, seed=arguments.seed)
        simulated.append(row)
        texts = [f"{way} {row[way]['coverage']:.3f} ± {row[way]['standard_error']:.3f}" for way in ("pooled", "by_lot")]
        print(f"{lots} lots, promised {COVERAGE:.0%}: {', '.join(texts)}", flush=True)
    record: dict[str, Any] = {
        "coverage": COVERAGE, "maps_a_lot": MAPS_A_LOT, "correlation": CORRELATION, "seed": arguments.seed,
        "simulated": simulated,
    }  # fmt: skip
    if arguments.model is not None:
        record["real"] = real(arguments.model, arguments.data, divisions=arguments.divisions, seed=arguments.seed)
        for name, row in record["real"]["divided_again"].items():
            print(f"{name}: {row}", flush=True)
    write_record(
        arguments.output,
        record,
        measures=(*MEASURES, *(SPLIT if "real" in record else ())),
        repeats=f"{arguments.repeats:,} fits of each number of lots",
        weights=None,
        search=None,
    )


if __name__ == "__main__":
    main()

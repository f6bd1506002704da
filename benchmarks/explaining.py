"""Measures whether the dies that an explanation points at are those that the answer rests on: the deletion test.

Of the test part (the product's split by lot), so many maps of each predicted class, drawn at random among those with
ten failing dies or more: the probability of the predicted class while failing dies are made to pass, the most relevant
first, against the mean over random orders. The area between the two curves is averaged over maps; its interval leaves
out a lot at a time. The model must have been trained on the same data and seed, so that it has not seen the test part.
Seconds are those of one map's relevance, without the start.

    python benchmarks/explaining.py --data wm811k.npz --model checkpoints/production/lightning_cnn/model.onnx \
        --output benchmarks/results/explaining.json --pictures docs
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from measure import write_record

from waferlab.data.maps import WaferMaps
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.deployment.explain import Explainer
from waferlab.deployment.predictor import Predictor
from waferlab.evaluation.deletion import area_between, deletion_curves
from waferlab.evaluation.metrics import mean_over_lots
from waferlab.reports.explain_figures import plot_deletion, plot_relevance

MEASURES = ("Explainer", "with_relevance", "Backward", "RULES", "deletion_curves", "area_between", "mean_over_lots")
FEWEST_FAILING = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PATH")
    parser.add_argument("--model", required=True, help="a .onnx file, or models:/<name>@champion")
    parser.add_argument("--per-class", type=int, default=100, help="maps at most of each predicted class")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draws", type=int, default=10, help="random orders of each map")
    parser.add_argument("--seed", type=int, default=0, help="of the split, and of what is drawn")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    maps = load_wafer_maps(arguments.data)
    maps = maps.select(split_by_lot(maps, seed=arguments.seed).test)
    predictor = Predictor.load(arguments.model)
    probabilities = predictor.probabilities([maps[i] for i in range(len(maps))])
    chosen = choose(maps, probabilities, arguments.per_class, seed=arguments.seed)
    explainer, classes, seconds, examples = Explainer(predictor), {}, [], []
    for label, members in chosen.items():
        name, found, drawn = predictor.class_names[label], [], []
        for i in members:
            started = time.perf_counter()
            relevance = explainer.relevance(maps[i], label)
            seconds.append(time.perf_counter() - started)
            options = {"steps": arguments.steps, "draws": arguments.draws, "seed": arguments.seed}
            found.append(deletion_curves(predictor.probabilities, maps[i], relevance, label, **options))
            drawn.append((maps[i], relevance, (name, f"test map {i}", float(probabilities[i, label]))))
        examples.append(drawn[in_the_middle(found)])
        classes[name] = summary(np.array(found), maps.groups[members])
        print(f"{name}: area {classes[name]['area']:+.3f}, interval {classes[name]['area_interval']}", flush=True)
    settings = {name: getattr(arguments, name) for name in ("per_class", "steps", "draws", "seed")}
    record = {
        "benchmark": "explaining",
        "data": Path(arguments.data).name,
        "model": predictor.about.get("model_type", ""),
    }
    record |= {**settings, "classes": classes, "seconds_a_map": round(float(np.median(seconds)), 4)}
    repeats = f"{len(seconds)} maps, {arguments.draws} random orders"
    write_record(arguments.output, record, measures=MEASURES, repeats=repeats, weights=None, search=None)
    if arguments.pictures:
        plot_deletion(classes, path=arguments.pictures / "explain_deletion.png")
        plot_relevance(*zip(*examples, strict=True), path=arguments.pictures / "explain_overlays.png")


def choose(maps: WaferMaps, probabilities: np.ndarray, per_class: int, *, seed: int) -> dict[int, np.ndarray]:
    """Indices of the maps to explain, by the class that is predicted for them."""
    rng, predicted = np.random.default_rng(seed), probabilities.argmax(1)
    enough = np.array([(maps[i] == 2).sum() >= FEWEST_FAILING for i in range(len(maps))])
    order = rng.permutation(np.flatnonzero(enough))
    return {int(label): order[predicted[order] == label][:per_class] for label in np.unique(predicted[order])}


def in_the_middle(curves: list[np.ndarray]) -> int:
    """The map whose area between the curves is the median of its class: neither the best nor the worst is shown."""
    return int(np.argsort([area_between(*one) for one in curves])[len(curves) // 2])


def summary(curves: np.ndarray, groups: np.ndarray) -> dict:
    """Of curves [maps, 2, steps + 1]: their means, and the area between them with its interval over lots."""
    areas = np.array([area_between(*one) for one in curves])
    area, interval = mean_over_lots(areas, groups)
    by_relevance, at_random = curves.mean(axis=0).round(4).tolist()
    shares = np.linspace(0, 1, curves.shape[-1]).round(4).tolist()
    return {
        "maps": len(curves), "lots": len(np.unique(groups)), "shares": shares, "by_relevance": by_relevance,
        "at_random": at_random, "area": area, "area_interval": interval,
    }  # fmt: skip


if __name__ == "__main__":
    main()

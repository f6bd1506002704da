"""Ways to train better in the same time that were thought of: each beside the recipe as it is, seed by seed.

Measured: macro F1 of `lightning_cnn` on the test lots, of all maps and of those on small grids (no side longer than 30
dies), after the same number of draws from the training part, with one thread. The loop is a bare one, with the
project's split, balanced draws, network, optimiser and learning rates, so that nothing but the recipe differs; answers
are from one view of each map. A seed changes the split, the weights and the draws.

  as-it-is    one channel, -1 where there is no die, 0 pass, 1 fail, resized bilinearly
  two-channels   where there are dies, and which of them fail, resized apart: in one channel, what lies between no die
              and a failing one looks like a pass
  nearest     each pixel takes the die that it lies in, on grids that are smaller than the image: none is blurred
  placed      grids that are smaller than the image are placed in its middle as they are, not stretched
  averaged    what is scored are the weights' running mean (decay 0.998)
  mixed       pairs of maps are mixed, and their labels with them (mixup, arXiv 1710.09412, alpha 0.3)
  small-twice maps of patterns on small grids are drawn twice as often

    python benchmarks/recipes.py --data wm811k.npz --output benchmarks/results/recipes.json

Several may be joined by a plus (two-channels+nearest). A call with the same output file adds to the record what it does
not have yet. The interval of a difference is corrected for the number of recipes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from measure import ROOT, earlier_runs, plain_config, rows, write_record
from provenance import CNN, SPLIT, _of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.data.maps import WaferMaps
    from waferlab.models.classifier import WaferClassifier

RECIPES = ("two-channels", "nearest", "placed", "averaged", "mixed", "small-twice")
SETTINGS = ("data", "draws", "batch_size", "image_size")
MEASURES = (
    *(*SPLIT, *CNN, "WaferClassifier", "augment", "keep_freed_memory"),
    *_of("recipes", "train", "draw_images", "resized", "augmented", "weights_of_draws", "one_step"),
)
SMALL = 30  # dies: the longest side of what is called a small grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="real maps, anything that --data of the scripts takes")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="to stand beside the one as it is")
    parser.add_argument("--draws", type=int, default=40_000, help="of training maps (default 40,000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2, help="trainings side by side (default 2)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(train(arguments, **json.loads(arguments.one))))
        return
    unknown = {part for recipe in arguments.recipes for part in recipe.split("+")} - {*RECIPES}
    if unknown:
        parser.error(f"--recipes {sorted(unknown)[0]}: unknown. Allowed: {', '.join(RECIPES)}, and joined by a plus.")

    settings = {name: getattr(arguments, name) for name in SETTINGS} | {"data": Path(arguments.data).name}
    runs = earlier_runs(arguments.output, settings)
    known = {(run["variant"], run["seed"]) for run in runs}
    cases = [(variant, seed) for seed in arguments.seeds for variant in ("as-it-is", *arguments.recipes)]
    with ThreadPoolExecutor(arguments.processes) as pool:
        left = [case for case in cases if case not in known]
        for run in pool.map(lambda case: in_own_process(arguments, *case), left):
            runs.append(run)
            print(json.dumps(run), flush=True)
            record = {"benchmark": "recipes", **settings, "outcome": outcome(runs), "runs": runs}
            repeats = f"{len({run['seed'] for run in runs})} seeds"
            write_record(arguments.output, record, measures=MEASURES, repeats=repeats, precision=["32-true"])


def in_own_process(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    flags = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in SETTINGS]
    command = [sys.executable, __file__, *flags, "--one", json.dumps({"variant": variant, "seed": seed})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return {"variant": variant, "seed": seed, **json.loads(done.stdout.splitlines()[-1])}


# ------------------------------------------------------------------------------------------------------- one training


def train(arguments: argparse.Namespace, *, variant: str, seed: int) -> dict[str, Any]:
    """Trains by a recipe and scores it."""
    import torch

    from waferlab.training.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    recipe = {*variant.split("+")}
    pipeline = prepared(arguments, seed)
    maps, parts = pipeline.maps, pipeline.split.parts()
    images, labels = draw_images(maps, recipe, arguments.image_size), torch.from_numpy(maps.labels)
    torch.manual_seed(seed)
    model = pipeline.create_model("lightning_cnn")
    if "two-channels" in recipe:
        first = model.network[0]
        model.network[0] = torch.nn.Conv2d(2, first.out_channels, 3, padding=1, bias=False)
    model.setup("fit")
    part, steps = torch.from_numpy(parts["train"]), arguments.draws // arguments.batch_size
    weights = weights_of_draws(labels[part], torch.from_numpy(small_grids(maps)[parts["train"]]), recipe)
    step = one_step(model, recipe, steps)
    started = time.monotonic()
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = part[torch.multinomial(weights, arguments.batch_size, replacement=True, generator=draws)]
        scored = step(augmented(images[drawn]), labels[drawn])
    seconds = time.monotonic() - started
    found = {name: score(scored, images, maps, parts[name]) for name in ("validation", "test")}
    return {
        "macro_f1": found["test"]["all"],
        "validation_macro_f1": found["validation"]["all"],
        "small_grids": found["test"]["small"],
        "large_grids": found["test"]["large"],
        "recall_on_small_grids": found["test"]["recall"],
        "seconds": round(seconds, 1),
        "maps": {name: len(indices) for name, indices in parts.items()},
    }


def prepared(arguments: argparse.Namespace, seed: int) -> IntegratedMLPipeline:
    from integrated_pipeline import IntegratedMLPipeline

    pipeline = IntegratedMLPipeline(plain_config(model_type="lightning_cnn", data=arguments.data, seed=seed))
    pipeline.prepare_data()
    return pipeline


def small_grids(maps: WaferMaps) -> np.ndarray:
    """Bool [N]."""
    import numpy as np

    return np.asarray(maps.shapes).max(1) <= SMALL


def draw_images(maps: WaferMaps, recipe: set[str], side: int) -> torch.Tensor:
    """Int8 [N, C, side, side], -127 to 127: in one channel no die, pass, fail; in two no die and die, pass and fail."""
    import numpy as np
    import torch

    out = torch.empty(len(maps), 2 if "two-channels" in recipe else 1, side, side, dtype=torch.int8)
    sizes, size_of = np.unique(np.asarray(maps.shapes), axis=0, return_inverse=True)
    for number in range(len(sizes)):
        for some in np.array_split(members := np.flatnonzero(size_of.ravel() == number), -(-len(members) // 256)):
            dies = torch.from_numpy(np.stack([maps[i] for i in some]))
            planes = [dies > 0, dies == 2] if "two-channels" in recipe else [dies / 2]
            drawn = torch.stack([resized(plane.float(), recipe, side) for plane in planes], 1)
            out[some] = ((2 * drawn - 1) * 127).round().to(torch.int8)
    return out


def resized(plane: torch.Tensor, recipe: set[str], side: int) -> torch.Tensor:
    """Float [n, h, w] to [n, side, side], by a recipe."""
    import torch

    rows, columns = plane.shape[-2:]
    if max(rows, columns) <= side and "placed" in recipe:
        top, left = (side - rows) // 2, (side - columns) // 2
        around = (left, side - columns - left, top, side - rows - top)
        return torch.nn.functional.pad(plane, around)
    if max(rows, columns) <= side and "nearest" in recipe:
        middle = torch.arange(side) + 0.5
        return plane[:, (middle * rows / side).long()][:, :, (middle * columns / side).long()]
    size = {"size": (side, side), "mode": "bilinear", "antialias": True}
    return torch.nn.functional.interpolate(plane[:, None], **size)[:, 0]


def augmented(images: torch.Tensor) -> torch.Tensor:
    """As the project does it: one of eight symmetries, and a few dies that pass instead of fail; float [B, C, S, S]."""
    import torch

    from waferlab.data.images import DIE_NOISE, augment

    images = images.float() / 127
    if images.shape[1] == 1:
        return augment(images)
    flips = torch.rand(3, len(images), 1, 1, 1) < 0.5
    for flip, axes in zip(flips[:2], (-1, -2), strict=True):
        images = torch.where(flip, images.flip(axes), images)
    images = torch.where(flips[2], images.transpose(-1, -2), images)
    dies, fails = images[:, :1], images[:, 1:]
    swapped = (torch.rand_like(dies) < DIE_NOISE) & (dies > 0)
    return torch.cat([dies, torch.where(swapped, -fails, fails)], 1)


def weights_of_draws(labels: torch.Tensor, small: torch.Tensor, recipe: set[str]) -> torch.Tensor:
    """Float [N], as the project's sampler has them, inverse square roots of the classes' frequencies."""
    import torch

    from waferlab.data.maps import CLASS_NAMES

    weights = torch.bincount(labels, minlength=len(CLASS_NAMES)).float().clamp(min=1).rsqrt()[labels]
    if "small-twice" in recipe:
        weights = torch.where(small & (labels != CLASS_NAMES.index("none")), 2 * weights, weights)
    return weights


def one_step(model: WaferClassifier, recipe: set[str], steps: int) -> Callable[[torch.Tensor, torch.Tensor], nn.Module]:
    """What trains on a batch and gives the network that is to be scored; the learning rates are the project's."""
    import numpy as np
    import torch

    model._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    made = model.train().configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    mean = copy.deepcopy(model.network) if "averaged" in recipe else None
    chance, done = np.random.default_rng(0), 0

    def step(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
        nonlocal done
        share, others = 1.0, torch.arange(len(images))
        if "mixed" in recipe:
            share, others = chance.beta(0.3, 0.3), torch.randperm(len(images))
        logits = model(share * images + (1 - share) * images[others])
        loss = share * model.loss(logits, labels) + (1 - share) * model.loss(logits, labels[others])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done += 1
        if mean is None:
            return model.network
        with torch.no_grad():
            for ours, now in zip(mean.state_dict().values(), model.network.state_dict().values(), strict=True):
                if ours.is_floating_point():
                    ours.lerp_(now, 1 - min(0.998, (1 + done) / (10 + done)))
                else:
                    ours.copy_(now)
        return mean

    return step


def score(network: nn.Module, images: torch.Tensor, maps: WaferMaps, part: np.ndarray) -> dict[str, Any]:
    """Macro F1 of all maps of a part, of small grids and of the others, and each class's recall on small grids."""
    import numpy as np
    import torch
    from sklearn.metrics import f1_score, recall_score

    from waferlab.data.maps import CLASS_NAMES

    network.eval()
    with torch.no_grad():
        batches = torch.from_numpy(part).split(512)
        ordered = [(images[some].float() / 127).contiguous(memory_format=torch.channels_last) for some in batches]
        answers = torch.cat([network(batch).argmax(1) for batch in ordered]).numpy()
    labels, small, classes = maps.labels[part], small_grids(maps)[part], range(len(CLASS_NAMES))

    def macro_f1(chosen: np.ndarray) -> float:
        there = np.unique(labels[chosen])
        return round(f1_score(labels[chosen], answers[chosen], labels=there, average="macro", zero_division=0), 4)

    recall = recall_score(labels[small], answers[small], labels=classes, average=None, zero_division=np.nan)
    return {
        "all": macro_f1(np.ones(len(part), bool)),
        "small": macro_f1(small),
        "large": macro_f1(~small),
        "recall": {name: round(float(r), 3) for name, r in zip(CLASS_NAMES, recall, strict=True) if r == r},
    }


# -------------------------------------------------------------------------------------------------- what came of them


def outcome(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe: mean scores, and the difference to the recipe as it is, corrected for their number."""
    from waferlab.evaluation.statistics import paired_differences

    variants = list(dict.fromkeys(run["variant"] for run in runs))
    first, *others = sorted(variants, key=lambda variant: variant != "as-it-is")
    differences = {row["a"]: row for row in paired_differences(runs, [(other, first) for other in others])}
    found = []
    for variant in (first, *others):
        ours = [run for run in runs if run["variant"] == variant]
        means = {name: round(sum(run[name] for run in ours) / len(ours), 4)
                 for name in ("macro_f1", "validation_macro_f1", "small_grids", "large_grids", "seconds")}  # fmt: skip
        recalls = {
            name: round(sum(values) / len(values), 3)
            for name in ("Scratch", "Loc", "Edge-Loc")
            if (values := [run["recall_on_small_grids"][name] for run in ours if name in run["recall_on_small_grids"]])
        }
        against = (
            {key: differences[variant][key] for key in ("difference", "interval", "p_corrected")}
            if variant in differences
            else None
        )
        found.append({"variant": variant, "seeds": len(ours), **means, "recalls": recalls, "against": against})
    return found


def table_of_recipes(record: dict[str, Any]) -> list[str]:
    """What a page says of a record."""
    cells = []
    for row in record["outcome"]:
        against, difference = row["against"], "-"
        if against is not None:
            low, high = against["interval"] or (None, None)
            difference = f"{against['difference']:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low is not None else "")
        recalls = " / ".join(f"{value:.2f}" for value in row["recalls"].values())
        cells.append([
            row["variant"], str(row["seeds"]), f"{row['macro_f1']:.3f}", difference, f"{row['small_grids']:.3f}",
            f"{row['large_grids']:.3f}", recalls, f"{row['seconds']:.0f}",
        ])  # fmt: skip
    heading = "recipe, seeds, test F1, difference, on small grids, on larger ones, "
    return rows(heading + "recall on small grids: Scratch / Loc / Edge-Loc, seconds", cells)


if __name__ == "__main__":
    main()

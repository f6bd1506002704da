"""Ways to train better in the same time that were thought of: each beside the recipe as it is, seed by seed.

Measured: macro F1 of `lightning_cnn` on the test lots, of all maps and of those on small grids (no side longer than 30
dies), after the same number of draws from the training part, with one thread. The loop is a bare one, with the
project's split, balanced draws, network, learning rates and, but for that, AdamW, so that nothing but the recipe
differs. A seed changes the split, the weights and the draws.

  as-it-is    AdamW, one channel, -1 where there is no die, 0 pass, 1 fail, resized bilinearly
  two-channels   where there are dies, and which of them fail, resized apart: in one channel, what lies between no die
              and a failing one looks like a pass
  nearest     each pixel takes the die that it lies in, on grids that are smaller than the image: none is blurred
  placed      grids that are smaller than the image are placed in its middle as they are, not stretched
  averaged    what is scored are the weights' running mean (decay 0.998)
  mixed       pairs of maps are mixed, and their labels with them (mixup, arXiv 1710.09412, alpha 0.3)
  small-twice maps of patterns on small grids are drawn twice as often
  pooled      on grids that are larger than the image each pixel is the mean of whole dies
  neighbours  a second channel: the share of failing dies among those around
  side-inputs three more channels, each of one value: the grid's rows and columns and the share of failing dies
  muon        Muon instead of AdamW (`waferlab/models/muon.py`)
  rate-half, rate-twice   another learning rate
  audited     maps whose label is probably wrong by confident learning, cross-validated by lot within the training part,
              are not drawn; the three networks that say so are trained before, for as many draws together
  distilled   a network of three times the width, trained before for as many draws, gives half of each target

    python benchmarks/recipes.py --data wm811k.npz --output benchmarks/results/recipes.json

Several may be joined by a plus (two-channels+nearest). A call with the same output file adds to the record what it does
not have yet. What is trained before is not in the seconds. The interval of a difference is corrected for the number of
recipes. On a GPU, `--device cuda`, the same is measured sooner; the seconds are then the GPU's.
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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from measure import ROOT, earlier_runs, plain_config, rows, write_record
from provenance import MUON, SPLIT, _of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.data.maps import WaferMaps
    from waferlab.models.classifier import WaferClassifier

RECIPES = (
    *("two-channels", "nearest", "placed", "averaged", "mixed", "small-twice", "pooled", "neighbours", "side-inputs"),
    *("muon", "audited", "distilled", "rate-half", "rate-twice"),
)
SETTINGS = ("data", "draws", "batch_size", "image_size", "device")
MEASURES = (
    *(*SPLIT, "LightningCNN", "ResidualBlock", "AverageAndMaxPool", "augment", "keep_freed_memory"),
    *_of("WaferClassifier", "__init__", "setup", "forward", "configure_optimizers", "_share_of_peak", "progress"),
    *_of("recipes", "train", "fit", "draw_images", "planes_of", "resized", "augmented", "weights_of_draws", "one_step"),
    *_of("recipes", "probably_wrong"),
    *MUON,
)
MEANS = ("macro_f1", "eight_views", "validation_macro_f1", "small_grids", "large_grids", "seconds")
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
    parser.add_argument("--device", default="cpu", help="that trains: cpu or cuda (default cpu)")
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
    data = Images(
        draw_images(maps, recipe, arguments.image_size).to(arguments.device),
        torch.from_numpy(maps.labels).to(arguments.device),
        torch.from_numpy(small_grids(maps)),
    )
    part, teacher = torch.from_numpy(parts["train"]), None
    length = {"draws": arguments.draws, "batch_size": arguments.batch_size}
    if "audited" in recipe:
        part = part[~probably_wrong(pipeline, data, part, recipe, **length)]
    if "distilled" in recipe:
        teacher = fit(made_network(pipeline, recipe, seed, base_channels=3 * 16), data, part, recipe, **length)
    model = made_network(pipeline, recipe, seed)
    started = time.monotonic()
    scored = fit(model, data, part, recipe, **length, seed=seed, teacher=teacher)
    seconds = time.monotonic() - started
    found = {name: score(scored, data.images, maps, parts[name]) for name in ("validation", "test")}
    return {
        "macro_f1": found["test"]["all"],
        "eight_views": found["test"]["eight_views"],
        "validation_macro_f1": found["validation"]["all"],
        "small_grids": found["test"]["small"],
        "large_grids": found["test"]["large"],
        "recall_on_small_grids": found["test"]["recall"],
        "seconds": round(seconds, 1),
        "maps": {name: len(indices) for name, indices in parts.items()},
    }


@dataclass(frozen=True)
class Images:
    """Int8 [N, C, S, S] and int64 [N], where they are trained on; bool [N], which are of small grids."""

    images: torch.Tensor
    labels: torch.Tensor
    small: torch.Tensor


def made_network(pipeline: IntegratedMLPipeline, recipe: set[str], seed: int, **parameters: Any) -> WaferClassifier:
    """An untrained network for the channels of a recipe."""
    import torch

    torch.manual_seed(seed)
    usual = {"learning_rate": 4e-3, "weight_decay": 0.05, "dropout": 0.1, "base_channels": 16}
    parameters = usual | {"optimizer": "muon" if "muon" in recipe else "adamw"} | parameters
    parameters["learning_rate"] *= 2 ** (("rate-twice" in recipe) - ("rate-half" in recipe))
    model = pipeline.create_model("lightning_cnn", parameters)
    channels = channels_of(recipe)
    if channels > 1:
        first = model.network[0]
        model.network[0] = torch.nn.Conv2d(channels, first.out_channels, 3, padding=1, bias=False)
    model.setup("fit")
    return model


def fit(
    model: WaferClassifier, data: Images, part: torch.Tensor, recipe: set[str], *, draws: int, batch_size: int,
    seed: int = 0, teacher: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """Trains on a part of the maps and returns the network that is to be scored."""
    import torch

    steps, device = draws // batch_size, data.images.device
    model.to(device)
    weights = weights_of_draws(data.labels.cpu()[part], data.small[part], recipe)
    step = one_step(model, recipe, steps, teacher)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = part[torch.multinomial(weights, batch_size, replacement=True, generator=generator)].to(device)
        scored = step(augmented(data.images[drawn], recipe), data.labels[drawn])
    return scored


def probably_wrong(
    pipeline: IntegratedMLPipeline, data: Images, part: torch.Tensor, recipe: set[str], *, draws: int, batch_size: int
) -> torch.Tensor:
    """Bool [len(part)]: maps that networks of other lots surely take for another class than that they are given."""
    import numpy as np
    import torch

    lots = np.unique(pipeline.maps.groups[part.numpy()])
    fold_of = dict(zip(np.random.default_rng(0).permutation(lots), np.arange(len(lots)) % 3, strict=True))
    folds = torch.tensor([fold_of[lot] for lot in pipeline.maps.groups[part.numpy()]])
    answers = torch.empty(len(part), 9)
    for fold in range(3):
        model = made_network(pipeline, recipe, fold)
        network = fit(model, data, part[folds != fold], recipe, draws=draws // 3, batch_size=batch_size).eval()
        answers[folds == fold] = probabilities(network, data.images, part[folds == fold]).cpu()
    given, answered = data.labels.cpu()[part], answers.argmax(1)
    right = given == answered
    sure = torch.stack([answers[right & (given == c), c].mean() for c in range(9)])  # as they are, of a class
    return ~right & (answers.amax(1) >= sure[answered])


def prepared(arguments: argparse.Namespace, seed: int) -> IntegratedMLPipeline:
    from integrated_pipeline import IntegratedMLPipeline

    pipeline = IntegratedMLPipeline(plain_config(model_type="lightning_cnn", data=arguments.data, seed=seed))
    pipeline.prepare_data()
    return pipeline


def small_grids(maps: WaferMaps) -> np.ndarray:
    """Bool [N]."""
    import numpy as np

    return np.asarray(maps.shapes).max(1) <= SMALL


def channels_of(recipe: set[str]) -> int:
    """Of an image."""
    return 1 + ("two-channels" in recipe) + ("neighbours" in recipe) + 3 * ("side-inputs" in recipe)


def draw_images(maps: WaferMaps, recipe: set[str], side: int) -> torch.Tensor:
    """Int8 [N, C, side, side], -127 to 127: in one channel no die, pass, fail; in two no die and die, pass and fail."""
    import numpy as np
    import torch

    out = torch.empty(len(maps), channels_of(recipe), side, side, dtype=torch.int8)
    sizes, size_of = np.unique(np.asarray(maps.shapes), axis=0, return_inverse=True)
    for number in range(len(sizes)):
        for some in np.array_split(members := np.flatnonzero(size_of.ravel() == number), -(-len(members) // 256)):
            dies = torch.from_numpy(np.stack([maps[i] for i in some]))
            drawn = torch.stack([resized(plane.float(), recipe, side) for plane in planes_of(dies, recipe)], 1)
            out[some] = ((2 * drawn - 1) * 127).round().to(torch.int8)
    return out


def planes_of(dies: torch.Tensor, recipe: set[str]) -> list[torch.Tensor]:
    """Planes of 0..1 and [n, h, w], from dies 0, 1, 2."""
    import torch

    fails, there = (dies == 2).float(), (dies > 0).float()
    planes = [there, fails] if "two-channels" in recipe else [dies / 2]
    if "neighbours" in recipe:
        around = torch.ones(1, 1, 3, 3)
        around[..., 1, 1] = 0
        failing, all_there = (
            torch.nn.functional.conv2d(plane[:, None], around, padding=1)[:, 0] for plane in (fails, there)
        )
        planes.append(failing / all_there.clamp(min=1))
    if "side-inputs" in recipe:
        rows, columns = dies.shape[-2:]
        share = fails.sum((1, 2)) / there.sum((1, 2)).clamp(min=1)
        planes += [torch.full_like(fails, min(1.0, length / 100)) for length in (rows, columns)]
        planes.append(share[:, None, None].expand_as(fails))
    return planes


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
    if min(rows, columns) >= side and "pooled" in recipe:
        return torch.nn.functional.adaptive_avg_pool2d(plane, side)
    size = {"size": (side, side), "mode": "bilinear", "antialias": True}
    return torch.nn.functional.interpolate(plane[:, None], **size)[:, 0]


def augmented(images: torch.Tensor, recipe: set[str]) -> torch.Tensor:
    """As the project does it: one of eight symmetries, and a few dies that pass instead of fail; float [B, C, S, S]."""
    import torch

    from waferlab.data.images import DIE_NOISE, augment

    images = images.float() / 127
    if images.shape[1] == 1:
        return augment(images)
    flips = torch.rand(3, len(images), 1, 1, 1, device=images.device) < 0.5
    for flip, axes in zip(flips[:2], (-1, -2), strict=True):
        images = torch.where(flip, images.flip(axes), images)
    images = torch.where(flips[2], images.transpose(-1, -2), images)
    dies = images[:, 0]
    swapped = (torch.rand_like(dies) < DIE_NOISE) & (dies >= 0)
    noisy = images.clone()
    if "two-channels" in recipe:
        noisy[:, 1] = torch.where(swapped, -images[:, 1], images[:, 1])
    else:
        noisy[:, 0] = torch.where(swapped, 1 - dies, dies)
    return noisy


def weights_of_draws(labels: torch.Tensor, small: torch.Tensor, recipe: set[str]) -> torch.Tensor:
    """Float [N], as the project's sampler has them, inverse square roots of the classes' frequencies."""
    import torch

    from waferlab.data.maps import CLASS_NAMES

    weights = torch.bincount(labels, minlength=len(CLASS_NAMES)).float().clamp(min=1).rsqrt()[labels]
    if "small-twice" in recipe:
        weights = torch.where(small & (labels != CLASS_NAMES.index("none")), 2 * weights, weights)
    return weights


def one_step(
    model: WaferClassifier, recipe: set[str], steps: int, teacher: nn.Module | None
) -> Callable[[torch.Tensor, torch.Tensor], nn.Module]:
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
            share, others = chance.beta(0.3, 0.3), torch.randperm(len(images), device=images.device)
        images = share * images + (1 - share) * images[others]
        logits = model(images)
        loss = share * model.loss(logits, labels) + (1 - share) * model.loss(logits, labels[others])
        if teacher is not None:
            with torch.no_grad():
                answers = teacher.eval()(images.contiguous(memory_format=torch.channels_last)).softmax(1)
            loss = (loss + torch.nn.functional.cross_entropy(logits, answers)) / 2
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


def probabilities(network: nn.Module, images: torch.Tensor, part: torch.Tensor, *, views: bool = False) -> torch.Tensor:
    """Float [len(part), 9], of one view or the mean of eight."""
    import torch

    from waferlab.data.images import symmetries

    found = []
    with torch.no_grad():
        for some in part.split(512):
            batch = images[some.to(images.device)].float() / 127
            seen = list(symmetries(batch)) if views else [batch]
            of_views = [network(view.contiguous(memory_format=torch.channels_last)).softmax(1) for view in seen]
            found.append(torch.stack(of_views).mean(0))
    return torch.cat(found)


def score(network: nn.Module, images: torch.Tensor, maps: WaferMaps, part: np.ndarray) -> dict[str, Any]:
    """Macro F1 of all maps of a part, of small grids and of the others, and each class's recall on small grids."""
    import numpy as np
    import torch
    from sklearn.metrics import f1_score, recall_score

    from waferlab.data.maps import CLASS_NAMES

    network.eval()
    answers = probabilities(network, images, torch.from_numpy(part)).argmax(1).cpu().numpy()
    of_eight = probabilities(network, images, torch.from_numpy(part), views=True).argmax(1).cpu().numpy()
    labels, small, classes = maps.labels[part], small_grids(maps)[part], range(len(CLASS_NAMES))

    def macro_f1(chosen: np.ndarray, answers: np.ndarray = answers) -> float:
        there = np.unique(labels[chosen])
        return round(f1_score(labels[chosen], answers[chosen], labels=there, average="macro", zero_division=0), 4)

    recall = recall_score(labels[small], answers[small], labels=classes, average=None, zero_division=np.nan)
    return {
        "all": macro_f1(np.ones(len(part), bool)),
        "eight_views": macro_f1(np.ones(len(part), bool), of_eight),
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
        means = {name: round(sum(run[name] for run in ours) / len(ours), 4) for name in MEANS}
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
            row["variant"], str(row["seeds"]), f"{row['macro_f1']:.3f}", difference, f"{row['eight_views']:.3f}",
            f"{row['validation_macro_f1']:.3f}", f"{row['small_grids']:.3f}",
            f"{row['large_grids']:.3f}", recalls, f"{row['seconds']:.0f}",
        ])  # fmt: skip
    heading = "recipe, seeds, test F1, difference, eight views, validation F1, on small grids, on larger ones, "
    return rows(heading + "recall on small grids: Scratch / Loc / Edge-Loc, seconds", cells)


if __name__ == "__main__":
    main()

"""Promises of the benchmark of recipes: each changes what it says, and all are held against the recipe as it is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import recipes  # noqa: E402

from waferlab.data.maps import WaferMaps  # noqa: E402


def drawn(dies, *recipe, side=8):
    """The image of one map by a recipe, int8 [C, side, side]."""
    dies = np.array(dies, np.uint8)
    maps = WaferMaps(
        dies.ravel(), np.array([0, dies.size]), np.array([dies.shape]), np.zeros(1, int), np.zeros(1, int), "made"
    )
    return recipes.draw_images(maps, {*recipe}, side)[0]


def test_small_grids_are_placed_as_they_are_or_take_the_nearest_die():
    dies = [[0, 1, 0, 1], [1, 2, 1, 2]]
    placed = drawn(dies, "placed")[0]
    assert placed[3:5, 2:6].tolist() == [[-127, 0, -127, 0], [0, 127, 0, 127]]
    assert (placed != -127).sum() == 6  # as many as there are dies
    nearest = drawn(dies, "nearest")[0]
    assert nearest[:4].tolist() == [[-127, -127, 0, 0] * 2] * 4 and nearest[4:].tolist() == [[0, 0, 127, 127] * 2] * 4
    assert len(drawn(dies)[0].unique()) > 3
    large = np.random.default_rng(0).integers(0, 3, (20, 20))
    assert torch.equal(drawn(large), drawn(large, "placed")) and torch.equal(drawn(large), drawn(large, "nearest"))


def test_in_two_channels_nothing_between_no_die_and_failing_looks_like_a_pass():
    edge = [[0, 2], [0, 2]]
    assert (drawn(edge)[0].abs() < 40).any()
    dies, fails = drawn(edge, "two-channels")
    torch.testing.assert_close(dies, fails, atol=1, rtol=0)  # what there is fails, everywhere


def test_augmentation_of_two_channels_turns_both_alike_and_fails_only_dies():
    torch.manual_seed(0)
    images = drawn(np.random.default_rng(0).integers(0, 3, (8, 8)), "two-channels").expand(500, 2, 8, 8)
    dies, fails = (plane > 0 for plane in recipes.augmented(images).unbind(1))
    assert not (fails & ~dies).any()
    views = [turned for k in range(4) for v in [torch.rot90(images[0, 0] > 0, k)] for turned in (v, v.flip(-1))]
    assert {str(one.tolist()) for one in dies} == {str(view.tolist()) for view in views}
    swapped = (fails.flatten(1).sum(1) != (images[0, 1] > 0).sum()).float().mean()
    assert 0.1 < swapped < 0.9


def test_small_grids_with_a_pattern_are_drawn_twice_as_often():
    labels, small = torch.tensor([0, 0, 8, 8]), torch.tensor([True, False, True, False])
    ratio = recipes.weights_of_draws(labels, small, {"small-twice"}) / recipes.weights_of_draws(labels, small, set())
    assert ratio.tolist() == [2, 1, 1, 1]


def test_recipes_are_compared_seed_by_seed_and_a_second_call_goes_on(tiny_npz, tmp_path):
    flags = ["--data", tiny_npz, "--draws", 64, "--batch-size", 16, "--image-size", 16, "--processes", 1]
    flags += ["--output", tmp_path / "record.json", "--recipes", "two-channels+placed"]

    def run(*more):
        command = [sys.executable, ROOT / "benchmarks/recipes.py", *flags, *more]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        return json.loads((tmp_path / "record.json").read_text())

    first, record = run("--seeds", 0)["runs"], run("--seeds", 0, 1)
    assert record["runs"][:2] == first
    assert [(r["variant"], r["seed"]) for r in record["runs"][2:]] == [("as-it-is", 1), ("two-channels+placed", 1)]
    scores = {(r["variant"], r["seed"]): r["macro_f1"] for r in record["runs"]}
    mean = sum(scores["two-channels+placed", seed] - scores["as-it-is", seed] for seed in (0, 1)) / 2
    assert record["outcome"][1]["against"]["difference"] == pytest.approx(mean)
    assert len(recipes.table_of_recipes(record)) == 4

"""Promises of the benchmark of recipes: each changes what it says, and all are held against the recipe as it is."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import recipes  # noqa: E402

from waferlab.data.maps import CLASS_NAMES, WaferMaps  # noqa: E402


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
    dies, fails = (plane > 0 for plane in recipes.augmented(images, {"two-channels"}).unbind(1))
    assert not (fails & ~dies).any()
    views = [turned for k in range(4) for v in [torch.rot90(images[0, 0] > 0, k)] for turned in (v, v.flip(-1))]
    assert {str(one.tolist()) for one in dies} == {str(view.tolist()) for view in views}
    swapped = (fails.flatten(1).sum(1) != (images[0, 1] > 0).sum()).float().mean()
    assert 0.1 < swapped < 0.9


def test_more_channels_say_how_many_neighbours_fail_and_how_large_and_bad_the_grid_is():
    dies = np.ones((8, 8), np.uint8)
    dies[3:6, 3:6] = 2
    image, neighbours, rows, columns, share = drawn(dies, "neighbours", "side-inputs")
    assert torch.equal(image, drawn(dies)[0])
    assert neighbours[4, 4] == 127 and neighbours[0, 0] == -127 and neighbours[2, 4] == round((2 * 3 / 8 - 1) * 127)
    assert {*rows.unique().tolist(), *columns.unique().tolist()} == {round((2 * 0.08 - 1) * 127)}
    assert share.unique().tolist() == [round((2 * 9 / 64 - 1) * 127)]


def test_large_grids_are_pooled_by_whole_dies():
    dies = np.ones((16, 16), np.uint8)
    dies[:2, :2] = 2
    pooled = drawn(dies, "pooled")[0]
    assert pooled[0, 0] == 127 and (pooled.flatten()[1:] == 0).all()
    assert not torch.equal(pooled, drawn(dies)[0])


def test_what_networks_of_other_lots_surely_take_for_something_else_is_probably_wrong(monkeypatch):
    labels = torch.tensor([0, 0, 1, 1, 0, 1])
    answers = torch.zeros(6, 9)
    answers[range(6), labels] = torch.tensor([0.9, 0.8, 0.9, 0.8, 0.3, 0.45])
    answers[4, 1] = 0.86  # surer than maps of that class are of it, 0.85 on average
    answers[5, 0] = 0.55  # less sure than maps of that class are, 0.85
    data = SimpleNamespace(images=answers, labels=labels)
    monkeypatch.setattr(recipes, "made_network", lambda *_: None)
    monkeypatch.setattr(recipes, "fit", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(recipes, "probabilities", lambda network, images, part: images[part])
    pipeline = SimpleNamespace(maps=SimpleNamespace(groups=np.arange(6)))
    found = recipes.probably_wrong(pipeline, data, torch.arange(6), set(), draws=3, batch_size=1)
    assert found.tolist() == [False, False, False, False, True, False]


def test_small_grids_with_a_pattern_are_drawn_twice_as_often():
    labels, small = torch.tensor([0, 0, 8, 8]), torch.tensor([True, False, True, False])
    ratio = recipes.weights_of_draws(labels, small, {"small-twice"}) / recipes.weights_of_draws(labels, small, set())
    assert ratio.tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize(
    "variant", ["as-it-is", "two-channels+placed", "averaged+mixed+small-twice", "muon+neighbours+audited+distilled"]
)
def test_each_recipe_trains_and_is_scored_by_grid_size(variant, tiny_npz):
    arguments = SimpleNamespace(data=str(tiny_npz), draws=48, batch_size=16, image_size=16, device="cpu")
    threads = torch.get_num_threads()
    found = recipes.train(arguments, variant=variant, seed=0)
    torch.set_num_threads(threads)
    assert all(0 <= found[name] <= 1 for name in recipes.MEANS[:-1])
    assert set(found["recall_on_small_grids"]) <= set(CLASS_NAMES) and found["maps"]["test"] > 0


def test_recipes_are_compared_seed_by_seed_and_a_second_call_goes_on(tmp_path, monkeypatch):
    trained = []

    def in_own_process(arguments, variant, seed):
        trained.append((variant, seed))
        score = 0.5 + 0.1 * seed + 0.01 * (variant == "placed") * (seed + 1)
        names = ("macro_f1", "eight_views", "validation_macro_f1", "small_grids", "large_grids")
        scores = dict.fromkeys(names, score)
        return {"variant": variant, "seed": seed, **scores, "recall_on_small_grids": {"Loc": 0.5}, "seconds": 1.0,
                "maps": {"train": 8, "test": 2}}  # fmt: skip

    def run(*seeds):
        flags = ["--data", "maps.npz", "--recipes", "placed", "--output", str(tmp_path / "record.json")]
        monkeypatch.setattr(sys, "argv", ["recipes.py", *flags, "--seeds", *seeds])
        recipes.main()
        return json.loads((tmp_path / "record.json").read_text())

    monkeypatch.setattr(recipes, "in_own_process", in_own_process)
    run("0")
    record = run("0", "1")
    assert trained == [("as-it-is", 0), ("placed", 0), ("as-it-is", 1), ("placed", 1)]
    assert record["outcome"][1]["against"]["difference"] == pytest.approx(0.015)
    assert "| placed | 2 | 0.565 | +0.015 [" in "\n".join(recipes.table_of_recipes(record))

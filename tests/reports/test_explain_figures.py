"""Promises about the pictures of explanations: colour is where relevance is, and curves are drawn as they are."""

import numpy as np
from made_up_predictions import assert_is_a_picture

from waferlab.reports.explain_figures import _heated, plot_deletion, plot_relevance
from waferlab.reports.wafers import die_colours


def test_only_what_speaks_for_the_class_has_colour():
    one_map = np.array([[0, 1, 1], [2, 2, 1]], dtype=np.uint8)
    colours = _heated(one_map, np.array([[0, -3, 0], [2, 0, 1]], dtype=np.float32))
    spread = np.ptp(colours[..., :3].astype(int), axis=-1)
    assert colours[0, 0, 3] == 0  # no die
    assert spread[1, 0] > 60 and spread[1, 2] > 60
    assert max(spread[0, 1], spread[0, 2], spread[1, 1]) < 25
    none = _heated(one_map, np.full((2, 3), -1.0))
    np.testing.assert_array_equal(none, die_colours(one_map, "#EEF1F5", "#B4BBC6"))


def test_maps_of_any_number_and_size_fit_a_page(tmp_path):
    for number in (1, 5):
        maps = [np.full((3 + n, 4), 2, dtype=np.uint8) for n in range(number)]
        captions = [("a class with a very long name", "map 0", 0.999)] * number
        path = plot_relevance(maps, [one * 0.5 for one in maps], captions, path=tmp_path / f"{number}.png")
        assert_is_a_picture(path)


def test_deletion_is_drawn_for_each_class_with_or_without_an_interval(tmp_path):
    one = {"shares": [0, 1], "by_relevance": [0.9, 0.1], "at_random": [0.9, 0.2], "area": -0.05, "maps": 3, "lots": 2}
    classes = {"a": one | {"area_interval": [-0.1, 0.2]}, "b": one | {"area_interval": None}}
    assert_is_a_picture(plot_deletion(classes, path=tmp_path / "deletion.png"))

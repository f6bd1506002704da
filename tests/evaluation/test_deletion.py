"""Promises about the deletion test: dies go in the order of their relevance, and the area says which order is worse."""

import numpy as np
import pytest

from waferlab.evaluation.deletion import area_between, deletion_curves


def share_left(maps):
    """A model whose second class is as likely as many of the first row's dies fail; the other dies say nothing."""
    share = np.array([(one[0] == 2).mean() for one in maps], dtype=np.float32)
    return np.stack([1 - share, share], 1)


def test_the_most_relevant_dies_go_first_and_passing_ones_stay():
    one_map, relevance = np.full((4, 4), 2, dtype=np.uint8), np.zeros((4, 4))
    one_map[3], relevance[0], relevance[3] = 1, [4, 3, 2, 1], 9
    by_relevance, at_random = deletion_curves(share_left, one_map, relevance, 1, steps=12, draws=200)
    np.testing.assert_allclose(by_relevance, [1, 0.75, 0.5, 0.25, *[0] * 9])
    np.testing.assert_allclose(at_random, np.linspace(1, 0, 13), atol=0.06)
    assert area_between(by_relevance, at_random) == pytest.approx(0.5 - 2 / 12, abs=0.03)
    worst, _ = deletion_curves(share_left, one_map, -relevance, 1, steps=12)
    assert area_between(worst, at_random) < -0.3


def test_one_seed_gives_one_result_and_the_map_is_left_as_it_was():
    one_map = np.random.default_rng(0).integers(0, 3, (9, 7), dtype=np.uint8)
    before = one_map.copy()
    first, second = (deletion_curves(share_left, one_map, np.ones((9, 7)), 1, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(one_map, before)


def test_a_map_without_a_failing_die_is_named():
    with pytest.raises(ValueError, match="no die of the map fails"):
        deletion_curves(share_left, np.ones((2, 2), dtype=np.uint8), np.ones((2, 2)), 1)

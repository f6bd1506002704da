"""Promises about the generated maps."""

import numpy as np
import pytest

from waferlab.data.generator import generate_wafer_maps
from waferlab.data.maps import CLASS_NAMES


@pytest.fixture(scope="module")
def generated():
    return generate_wafer_maps(150, seed=0)


def test_the_default_is_1350_maps_150_a_class(generated):
    maps, labels, lots = generated
    assert len(maps) == len(labels) == len(lots) == 1350
    assert np.bincount(labels).tolist() == [150] * 9


def test_the_same_seed_gives_the_same_maps_and_another_seed_others(generated):
    again, other = generate_wafer_maps(150, seed=0), generate_wafer_maps(150, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(generated[0], again[0], strict=True))
    assert np.array_equal(generated[2], again[2])
    assert not all(np.array_equal(a, b) for a, b in zip(generated[0], other[0], strict=True))


def test_maps_are_round_die_grids_of_many_sizes(generated):
    sizes = {m.shape for m in generated[0]}
    assert len(sizes) > 15
    for die_map in generated[0][::50]:
        assert die_map.dtype == np.uint8 and set(np.unique(die_map)) <= {0, 1, 2}
        corners = die_map[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == 0).all()
        assert 0.6 < (die_map > 0).mean() < 0.9  # a disc fills 0.785 of its square


def test_wafers_of_a_lot_share_their_grid(generated):
    maps, _, lots = generated
    for lot in np.unique(lots)[::7]:
        assert len({maps[i].shape for i in np.flatnonzero(lots == lot)}) == 1


def test_classes_differ_as_real_ones_do(generated):
    maps, labels, _ = generated
    density = np.array([(m == 2).sum() / (m > 0).sum() for m in maps])
    mean = {name: density[labels == i].mean() for i, name in enumerate(CLASS_NAMES)}
    assert mean["Near-full"] > 0.75 > mean["Random"] > 0.4 > mean["Center"]
    assert 0.08 < mean["Scratch"] < mean["none"] < mean["Edge-Loc"] < mean["Center"]  # as the medians of WM-811K


def test_counts_can_be_given_for_each_class_and_bad_ones_are_refused():
    counts = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert np.bincount(generate_wafer_maps(counts, seed=0)[1]).tolist() == counts
    with pytest.raises(ValueError, match="samples_per_class is 0"):
        generate_wafer_maps(0)

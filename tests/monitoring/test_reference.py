"""Promises about what is kept of the validation part: all lots, whole, safe to load, and rubbish is named."""

import numpy as np
import pytest
from made_up_lots import make_reference

from waferlab.errors import ModelError
from waferlab.monitoring import reference as module
from waferlab.monitoring.reference import Reference, at_most, place_in_lot

ARRAYS = ("probabilities", "features", "lots", "density", "grids")


@pytest.fixture
def kept(tmp_path):
    reference = make_reference(np.random.default_rng(0), 12)
    return reference, reference.save(tmp_path / "reference.npz")


def test_it_comes_back_as_it_was(kept):
    before, file = kept
    after = Reference.load(file)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(after.sample, name), getattr(before.sample, name))
        assert getattr(after.sample, name).dtype == getattr(before.sample, name).dtype
    np.testing.assert_array_equal(after.labels, before.labels)
    np.testing.assert_array_equal(after.training_counts, before.training_counts)
    assert after.class_names == before.class_names
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    np.load(file, allow_pickle=False)["features"]


def changed(file, **arrays):
    with np.load(file, allow_pickle=False) as held:
        np.savez(file, **({name: held[name] for name in held.files} | arrays))


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"labels": np.zeros(5, dtype=np.int64)}, "wanted"),
        ({"labels": np.full(96, 7)}, "labels are not those"),
        ({"probabilities": np.full((96, 3), np.nan, dtype=np.float32)}, "a number in it is none"),
        ({"features": np.full((96, 5), "a")}, "features are"),
        ({"features": np.array([{}], dtype=object)}, "without pickles"),
        ({"class_names": np.arange(3)}, "class names"),
    ],
)
def test_rubbish_is_named_with_a_remedy(kept, arrays, complaint):
    changed(kept[1], **arrays)
    with pytest.raises(ModelError, match=complaint) as refused:
        Reference.load(kept[1])
    assert str(kept[1]) in str(refused.value) and "train the model anew" in str(refused.value)


def test_a_file_that_is_missing_cut_off_or_lacks_an_array_is_named(kept, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        Reference.load(tmp_path / "other.npz")
    content = kept[1].read_bytes()
    kept[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        Reference.load(kept[1])
    np.savez(kept[1], labels=np.zeros(3))
    with pytest.raises(ModelError, match="probabilities, features, lots, density, grids"):
        Reference.load(kept[1])


def test_large_lots_are_thinned_and_none_is_given_up():
    lots = np.repeat(np.arange(30), np.arange(1, 31))
    kept = at_most(lots, 200, np.random.default_rng(0))
    assert len(kept) <= 200 and len(np.unique(lots[kept])) == 30
    sizes = np.bincount(lots[kept])
    assert sizes[:5].tolist() == [1, 2, 3, 4, 5] and sizes.max() < 10
    assert len(at_most(np.arange(500), 200, np.random.default_rng(0))) == 200
    assert len(at_most(lots, 1000, np.random.default_rng(0))) == len(lots)


def test_each_map_has_its_own_place_in_its_lot():
    lots = np.random.default_rng(0).integers(0, 5, 60)
    place = place_in_lot(lots, np.random.default_rng(1))
    for lot in range(5):
        assert sorted(place[lots == lot]) == list(range((lots == lot).sum()))


def test_it_is_bounded(kept, monkeypatch):
    monkeypatch.setattr("waferlab.data.npz.ALWAYS_ALLOWED", 100)
    monkeypatch.setattr("waferlab.data.npz.LARGEST_RATIO", 0)
    with pytest.raises(ModelError, match="are read"):
        module.Reference.load(kept[1])

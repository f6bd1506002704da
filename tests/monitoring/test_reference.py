"""Promises about what is kept of the validation part: all lots, whole, safe to load, and rubbish is named."""

from dataclasses import replace

import numpy as np
import pytest
from made_up_lots import make_reference

from waferlab.errors import ModelError
from waferlab.monitoring import reference as module
from waferlab.monitoring.reference import Reference, Sample, at_most, place_in_lot

ARRAYS = ("probabilities", "features", "lots", "density", "grids", "weights")


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
        ({"weights": np.zeros(96, np.float32)}, "stands for none"),
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
    rng = np.random.default_rng(0)
    kept = at_most(lots, 200, rng.random(len(lots)))
    assert len(kept) <= 200 and len(np.unique(lots[kept])) == 30
    sizes = np.bincount(lots[kept])
    assert sizes[:5].tolist() == [1, 2, 3, 4, 5] and sizes.max() < 10
    assert len(at_most(np.arange(500), 200, rng.random(500))) == 200
    assert len(at_most(lots, 1000, rng.random(len(lots)))) == len(lots)


def test_of_more_lots_than_maps_some_are_kept_of_all_places_alike():
    kept = at_most(np.arange(5000), 500, np.random.default_rng(0).random(5000))
    assert np.bincount(kept // 500, minlength=10).tolist() == pytest.approx([50] * 10, abs=3)


def test_maps_of_a_thinned_lot_stand_for_the_others():
    reference = make_reference(np.random.default_rng(0), 12)
    sample, lots = reference.sample, np.repeat(np.arange(12), np.arange(1, 13))
    kept = Sample.joined([sample] * 2).select(np.flatnonzero(place_in_lot(lots, np.arange(78)) < 3))
    kept = replace(kept, lots=lots[place_in_lot(lots, np.arange(78)) < 3]).standing_for(lots)
    for lot in range(12):
        assert kept.weights[kept.lots == lot].sum() == pytest.approx(lot + 1)
    heavy = replace(sample, weights=np.where(sample.density > np.quantile(sample.density, 0.8), 1000, 1))
    assert heavy.median_density() > np.quantile(sample.density, 0.8)
    shares = replace(reference, sample=replace(sample, weights=1.0 + 9 * (reference.labels == 0))).shares
    n = np.bincount(reference.labels, minlength=3)
    assert shares == pytest.approx(np.array([10 * n[0], n[1], n[2]]) / (10 * n[0] + n[1] + n[2]))


def test_a_reference_of_before_there_were_weights_is_read(kept):
    with np.load(kept[1], allow_pickle=False) as held:
        np.savez(kept[1], **{name: held[name] for name in held.files if name != "weights"})
    assert (Reference.load(kept[1]).sample.weights == 1).all()


def test_each_map_has_its_own_place_in_its_lot():
    lots = np.random.default_rng(0).integers(0, 5, 60)
    place = place_in_lot(lots, np.random.default_rng(1).random(60))
    for lot in range(5):
        assert sorted(place[lots == lot]) == list(range((lots == lot).sum()))


def test_it_is_bounded(kept, monkeypatch):
    monkeypatch.setattr("waferlab.data.npz.ALWAYS_ALLOWED", 100)
    monkeypatch.setattr("waferlab.data.npz.LARGEST_RATIO", 0)
    with pytest.raises(ModelError, match="are read"):
        module.Reference.load(kept[1])

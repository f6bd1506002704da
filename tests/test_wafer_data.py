"""Promises about reading, splitting and serving wafer maps."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import wafer_data
from wafer_data import (
    CLASS_NAMES,
    DataError,
    EpochBatches,
    WaferMapDataModule,
    augment,
    encode,
    load_wafer_maps,
    pack_maps,
    resize_maps,
    split_by_lot,
    symmetries,
)


@pytest.fixture(scope="module")
def generated():
    return load_wafer_maps(samples_per_class=60, seed=1)


def save(tmp_path, **arrays):
    path = tmp_path / "maps.npz"
    np.savez(path, **arrays)
    return path


# --- reading


def test_our_layout_is_read_back_map_by_map(tiny_npz, tiny_arrays):
    maps = load_wafer_maps(tiny_npz)
    offsets, shapes = tiny_arrays["offsets"], tiny_arrays["shapes"]
    for i in (0, 7, len(maps) - 1):
        expected = tiny_arrays["maps_flat"][offsets[i] : offsets[i + 1]].reshape(shapes[i])
        assert np.array_equal(maps[i], expected)
        assert CLASS_NAMES[maps.labels[i]] == tiny_arrays["labels"][i]
    assert np.array_equal(maps.groups, tiny_arrays["group"])


def test_dense_layout_is_read_and_each_map_is_its_own_lot(tmp_path):
    dense = np.random.default_rng(0).integers(0, 3, (18, 12, 10), dtype=np.uint8)
    maps = load_wafer_maps(save(tmp_path, maps=dense, labels=np.array(CLASS_NAMES * 2)))
    assert np.array_equal(np.stack([maps[i] for i in range(18)]), dense)
    assert len(set(maps.groups)) == 18


def test_mixedwm38_keeps_single_and_defect_free_maps_and_says_what_it_left_out(tmp_path):
    dense = np.ones((11, 8, 8), dtype=np.int32)
    columns = np.zeros((11, 8), dtype=np.int32)
    columns[np.arange(8), np.arange(8)] = 1  # one of each pattern; 8 and 9 defect-free; 10 a mixture
    columns[10, :2] = 1
    dense[9, 0, 0] = 3
    maps = load_wafer_maps(save(tmp_path, arr_0=dense, arr_1=columns))
    names = [CLASS_NAMES[label] for label in maps.labels]
    assert names == [*wafer_data.MIXEDWM38_COLUMNS, "none"]
    assert "left out: 1 mixed, 1 with die values above 2" in maps.notes[0]


@pytest.mark.parametrize(
    ("levels", "pixels", "expected"),
    [
        ("auto", [[0, 128, 255], [120, 130, 250]], [[0, 1, 2], [1, 1, 2]]),
        ("auto", [[0, 0, 255], [0, 255, 0]], "binary"),
        ("binary", [[0, 128, 255], [0, 0, 255]], "binary"),
    ],
)
def test_images_are_read_in_two_or_three_levels_and_the_note_says_which(tmp_path, levels, pixels, expected):
    for name in CLASS_NAMES:
        (tmp_path / name).mkdir()
        Image.fromarray(np.array(pixels, dtype=np.uint8)).save(tmp_path / name / "a.png")
    maps = load_wafer_maps(tmp_path, image_levels=levels)
    assert maps.class_counts.tolist() == [1] * 9
    if expected == "binary":
        assert "two levels" in maps.notes[0]
        assert np.array_equal(maps[0] == 2, np.array(pixels) >= 128)
    else:
        assert "three grey levels" in maps.notes[0]
        assert maps[0].tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": lambda a: np.where(a == "none", "nothing", a)}, "unknown label 'nothing'"),
        ({"maps_flat": lambda a: np.where(a == 2, 7, a).astype(np.uint8)}, "die value 7"),
        ({"maps_flat": lambda a: a.astype(np.float32)}, "float32, not uint8"),
        ({"shapes": lambda a: a[:-1]}, "shapes"),
        ({"shapes": lambda a: a + 1}, "offsets do not fit"),
        ({"labels": lambda a: np.arange(len(a))}, "Expected class names"),
        ({"group": lambda a: a[:-3]}, "group"),
    ],
)
def test_damaged_arrays_get_an_error_that_names_the_value(tmp_path, tiny_arrays, change, message):
    arrays = dict(tiny_arrays)
    for key, edit in change.items():
        arrays[key] = edit(arrays[key])
    with pytest.raises(DataError, match=message):
        load_wafer_maps(save(tmp_path, **arrays))


def test_an_npz_with_a_pickle_inside_is_refused_and_the_pickle_does_not_run(tmp_path):
    proof = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    path = save(tmp_path, maps=np.array([Hostile()], dtype=object), labels=np.array(["none"]))
    with pytest.raises(DataError, match="without pickles"):
        load_wafer_maps(path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_gets_a_clear_error(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        load_wafer_maps(tmp_path / "bad.npz")


def test_a_missing_path_and_an_unknown_kind_of_file_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_wafer_maps(tmp_path / "nowhere.npz")
    (tmp_path / "maps.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"unknown kind of file '\.csv'"):
        load_wafer_maps(tmp_path / "maps.csv")


def test_unknown_class_folders_and_broken_images_are_named(tmp_path):
    (tmp_path / "Spiral").mkdir()
    with pytest.raises(DataError, match="'Spiral'"):
        load_wafer_maps(tmp_path)
    (tmp_path / "Spiral").rename(tmp_path / "edge_ring")
    (tmp_path / "edge_ring" / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png: not a readable image"):
        load_wafer_maps(tmp_path)


def test_at_most_so_many_of_each_class_are_kept(tiny_npz):
    maps = load_wafer_maps(tiny_npz, max_samples_per_class=5)
    assert maps.class_counts.tolist() == [5] * 9
    assert "At most 5" in maps.notes[-1]


# --- splitting


def test_no_lot_is_in_two_splits(generated):
    parts = split_by_lot(generated, seed=0).parts().values()
    lots = [set(generated.groups[part]) for part in parts]
    assert not (lots[0] & lots[1] or lots[0] & lots[2] or lots[1] & lots[2])
    assert sorted(np.concatenate(list(parts))) == list(range(len(generated)))


def test_every_class_is_in_every_part_in_about_its_share(generated):
    split = split_by_lot(generated, seed=0)
    for part, share in ((split.train, 0.70), (split.validation, 0.15), (split.test, 0.15)):
        counts = np.bincount(generated.labels[part], minlength=9)
        assert counts.min() > 0
        assert abs(len(part) / len(generated) - share) < 0.06


def test_exact_copies_of_a_map_are_never_in_two_parts(generated):
    rng = np.random.default_rng(0)
    copied = rng.choice(len(generated), 25, replace=False)
    maps = pack_maps(
        [generated[i] for i in range(len(generated))] + [generated[i] for i in copied],
        np.concatenate([generated.labels, generated.labels[copied]]),
        groups=np.concatenate([generated.groups, 10_000 + np.arange(25)]),  # copies turn up in other lots
        source="with copies",
    )
    split = split_by_lot(maps, seed=0)
    digests = maps.digests()
    seen = [{digests[i] for i in part} for part in split.parts().values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_the_same_seed_gives_the_same_split_and_another_seed_another(generated):
    first, again, other = (split_by_lot(generated, seed=s) for s in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert np.array_equal(first.test, again.test)
    assert first.fingerprint != other.fingerprint


def test_one_changed_die_changes_the_fingerprint(generated):
    flat = generated.maps_flat.copy()
    at = np.flatnonzero(flat == 1)[0]
    flat[at] = 2
    changed = pack_maps(
        [
            flat[a:b].reshape(s)
            for a, b, s in zip(generated.offsets[:-1], generated.offsets[1:], generated.shapes, strict=True)
        ],
        generated.labels,
        groups=generated.groups,
        source="changed",
    )
    assert split_by_lot(changed, seed=0).fingerprint != split_by_lot(generated, seed=0).fingerprint


def test_an_empty_class_or_too_few_lots_is_named(generated):
    without = generated.select(np.flatnonzero(generated.labels != CLASS_NAMES.index("Donut")))
    with pytest.raises(DataError, match="'Donut' has 0 maps"):
        split_by_lot(without)
    one_lot = pack_maps(
        [generated[i] for i in range(len(generated))],
        generated.labels,
        groups=np.where(generated.labels == CLASS_NAMES.index("Scratch"), 99_999, generated.groups),
        source="one scratch lot",
    )
    with pytest.raises(DataError, match=r"'Scratch' has 60 maps from 1 lot"):
        split_by_lot(one_lot)


# --- batches


def test_resizing_keeps_the_three_levels_of_a_map_that_has_the_size_already():
    die_map = np.random.default_rng(0).integers(0, 3, (32, 32), dtype=np.uint8)
    images = resize_maps(pack_maps([die_map], np.array([0]), source="one"), 32)
    assert torch.equal(images[0, 0], torch.from_numpy(die_map) * 127)


def test_a_thin_scratch_on_a_large_map_does_not_vanish():
    die_map = np.ones((200, 200), dtype=np.uint8)
    die_map[:, 101] = 2
    images = encode(resize_maps(pack_maps([die_map], np.array([7]), source="one"), 48))
    column_of_scratch = images[0, 0].max(dim=1).values
    assert (column_of_scratch > 0.05).all()


def test_the_order_of_maps_survives_resizing_by_size(generated):
    images = resize_maps(generated, 24)
    for i in (0, 100, 333):
        alone = resize_maps(generated.select(np.array([i])), 24)
        assert torch.equal(images[i], alone[0])


def test_augmentation_draws_only_the_eight_symmetries_and_light_noise():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 6, 6) * -0.9 - 0.05  # below 0 there is no die, so no noise
    views = {view.numpy().tobytes() for view in symmetries(image)}
    assert len(views) == 8
    drawn = {a.unsqueeze(0).numpy().tobytes() for a in augment(image.expand(400, 1, 6, 6).contiguous())}
    assert drawn == views
    noisy = augment(torch.zeros(200, 1, 40, 40))
    assert 0.005 < noisy.mean() < 0.02


def test_a_resumed_epoch_sees_the_same_batches():
    batches = EpochBatches(100, batch_size=8, shuffle=True, seed=3)
    batches.set_epoch(4)
    first = [b.tolist() for b in batches]
    resumed = EpochBatches(100, batch_size=8, shuffle=True, seed=3)
    resumed.set_epoch(4)
    assert [b.tolist() for b in resumed] == first
    resumed.set_epoch(5)
    assert [b.tolist() for b in resumed] != first


def test_evaluation_batches_hold_every_map_once_in_order():
    batches = list(EpochBatches(100, batch_size=64, shuffle=False))
    assert torch.cat(batches).tolist() == list(range(100))


def test_balancing_weighs_by_inverse_square_root_and_drops_nothing(generated):
    scratch, none = CLASS_NAMES.index("Scratch"), CLASS_NAMES.index("none")
    keep = np.flatnonzero((generated.labels != scratch) | (np.arange(len(generated)) % 3 == 0))
    maps = generated.select(keep)
    split = split_by_lot(maps, seed=0)
    data = WaferMapDataModule(maps, split, image_size=16, balancing="loss")
    counts = np.bincount(maps.labels[split.train], minlength=9)
    weights = np.array(data.class_weights)
    assert weights[scratch] / weights[none] == pytest.approx((counts[none] / counts[scratch]) ** 0.5, rel=1e-4)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-4)
    assert len(data.train_dataloader().dataset) == len(split.train)
    sampled = WaferMapDataModule(maps, split, image_size=16)
    assert sampled.class_weights is None
    loader = sampled.train_dataloader()
    drawn = []
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        drawn.append(loader.dataset.labels[torch.cat(list(loader.sampler))])
    share = (torch.cat(drawn) == scratch).float().mean().item()
    assert 1.4 < share / (counts[scratch] / counts.sum()) < 2.2  # sqrt(45 / 13) = 1.86 against a common class

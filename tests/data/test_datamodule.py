"""Promises about the batches: the same again after a break, every map once in evaluation, rare classes weighed."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from integrated_pipeline import IntegratedMLPipeline
from simple_model import LightningCNN
from waferlab.config import ExperimentConfig
from waferlab.data import datamodule
from waferlab.data.datamodule import EpochBatches, WaferMapDataModule
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import get_tutorial_dataset, load_wafer_maps
from waferlab.data.splitting import split_by_lot


@pytest.fixture(scope="module")
def generated():
    return load_wafer_maps(samples_per_class=60, seed=1)


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


@pytest.mark.parametrize("balancing", ["loss", "sampler"])
def test_balancing_copes_with_a_class_that_training_lacks(generated, balancing):
    maps = generated.select(np.flatnonzero(generated.labels != CLASS_NAMES.index("Donut")))
    data = WaferMapDataModule(maps, split_by_lot(maps), image_size=16, balancing=balancing)
    weights = torch.tensor(data.class_weights or [0.0])
    assert torch.isfinite(weights).all() and weights[0 if balancing == "sampler" else CLASS_NAMES.index("Donut")] == 0
    drawn = torch.cat([labels for _, labels in data.train_dataloader()])
    assert len(drawn) > 0 and CLASS_NAMES.index("Donut") not in drawn


# --- before, with and without a Trainer


@pytest.fixture
def resized(monkeypatch):
    """The sizes that maps were resized to, once each time."""
    sizes, resize = [], datamodule.resize_maps
    monkeypatch.setattr(datamodule, "resize_maps", lambda maps, size: sizes.append(size) or resize(maps, size))
    return sizes


def tutorial(**settings):
    maps = get_tutorial_dataset(20)
    return WaferMapDataModule(maps, split_by_lot(maps), image_size=16, **settings)


def trainer(folder):
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


def test_maps_are_resized_when_lightning_sets_up_once_for_all_batch_sizes(resized, tmp_path):
    data = tutorial()
    small, large = data.with_batch_size(8), data.with_batch_size(64)
    assert not resized
    for one in (small, large):
        trainer(tmp_path).fit(LightningCNN(base_channels=4), datamodule=one)
    assert resized == [16]
    assert [len(next(iter(one.train_dataloader()))[0]) for one in (small, large)] == [8, 64]
    assert data.images("test").data_ptr() == large.images("test").data_ptr() and resized == [16]


def test_images_and_class_weights_need_no_trainer(resized):
    weights = tutorial(balancing="loss").class_weights
    assert len(weights) == 9 and resized == [16]
    data = tutorial()
    for part, indices in data.split.parts().items():
        assert data.images(part).shape == (len(indices), 1, 16, 16) and data.images(part).dtype == torch.uint8
    assert resized == [16, 16]


def test_a_pipeline_that_is_given_another_split_serves_that_one():
    maps = get_tutorial_dataset(20)
    pipeline = IntegratedMLPipeline(ExperimentConfig(enable_mlflow=False, image_size=16, quiet=True))
    for seed in (0, 1):
        split = split_by_lot(maps, seed=seed)
        pipeline.prepare_data(maps, split)
        labels = torch.cat([labels for _, labels in pipeline.data_module().test_dataloader()])
        assert labels.tolist() == maps.labels[split.test].tolist()

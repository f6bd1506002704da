"""Promises about the models: one interface, one registration each."""

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from integrated_pipeline import MODEL_REGISTRY, IntegratedMLPipeline, ModelSpec, register_model
from simple_model import LightningCNN
from waferlab.config import ExperimentConfig
from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.errors import ConfigError
from waferlab.models.classifier import WaferClassifier, macro_f1
from waferlab.models.torchvision_models import TorchvisionLightningModel

ROOT = Path(__file__).resolve().parents[2]


def pipeline(**settings):
    settings = {"use_pretrained": False, "enable_optuna": False, "enable_mlflow": False, "quiet": True} | settings
    return IntegratedMLPipeline(ExperimentConfig(**settings))


@pytest.fixture
def tiny_data(tiny_npz):
    maps = load_wafer_maps(tiny_npz)
    return WaferMapDataModule(maps, split_by_lot(maps), image_size=32, batch_size=16)


# --- one interface


@pytest.mark.parametrize("model_type", list(MODEL_REGISTRY))
def test_every_model_takes_one_channel_and_gives_nine_logits_in_training_and_after(model_type):
    model = pipeline(image_size=32).create_model(model_type)
    assert isinstance(model, WaferClassifier)
    images = torch.rand(4, 1, 32, 32) * 2 - 1
    for mode in (model.train(), model.eval()):
        logits = mode(images)
        assert logits.shape == (4, 9)
        assert not torch.allclose(logits.sum(1), torch.ones(4))  # logits, not probabilities


@pytest.mark.parametrize("model_type", ["lightning_cnn", "yolo_inspired"])
def test_a_model_works_in_a_bare_trainer_and_its_checkpoint_loads_without_pickles(model_type, tiny_data, tmp_path):
    model = pipeline(image_size=32).create_model(model_type)
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    trainer.fit(model, datamodule=tiny_data)
    assert {"train_loss", "val_loss", "train_macro_f1", "val_macro_f1"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)
    again = type(model)(**state["hyper_parameters"])
    again.load_state_dict(state["state_dict"])


def test_macro_f1_in_training_is_scikit_learns_over_the_classes_that_occur():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 6, 200), rng.integers(0, 8, 200)  # 6 and 7 are only answered, 8 never occurs
    counts = torch.zeros(9, 9)
    for t, s in zip(truth, said, strict=True):
        counts[t, s] += 1
    expected = f1_score(truth, said, labels=range(6), average="macro", zero_division=0)
    assert macro_f1(counts).item() == pytest.approx(expected)


def test_biases_and_normalisation_are_not_decayed(tiny_data, tmp_path):
    model = LightningCNN(base_channels=8, weight_decay=0.3)
    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, datamodule=tiny_data)
    decayed, plain = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.ndim > 1 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(p.ndim <= 1 for p in plain["params"])


def test_frozen_backbones_leave_only_the_head_to_train():
    model = TorchvisionLightningModel(architecture="resnet18", freeze_backbone=True)
    trainable = [name for name, p in model.network.named_parameters() if p.requires_grad]
    assert trainable and all(name.startswith("fc.") for name in trainable)


def test_a_small_stem_loses_no_die():
    model, seen = TorchvisionLightningModel(small_stem=True), []
    model.network.layer1.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 9) and seen == [(2, 64, 32, 32)]
    with pytest.raises(ValueError, match="efficientnet_b0 has none"):
        TorchvisionLightningModel(architecture="efficientnet_b0", small_stem=True)


def test_the_head_has_512_units_and_the_asked_dropout():
    for architecture in ("resnet18", "efficientnet_b0"):
        head = list(TorchvisionLightningModel(architecture=architecture, dropout=0.37).network.children())[-1]
        assert [m.out_features for m in head.modules() if isinstance(m, nn.Linear)] == [512, 9]
        assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.37]


# --- the factory


class Linear(WaferClassifier):
    """An architecture of somebody else's."""

    def __init__(self, *, width=8, slope=0.1, **training):
        super().__init__(**training)
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, width), nn.LeakyReLU(slope), nn.Linear(width, 9)
        )


def suggest_for_linear(trial, *, pretrained):
    return {
        "width": trial.suggest_categorical("width", (8, 16)),
        "slope": trial.suggest_float("slope", 0.01, 0.3, log=True),
    }


@pytest.fixture
def linear():
    """Registers it; it goes again when the test ends."""
    register_model("linear", ModelSpec(Linear, suggest=suggest_for_linear, portfolio=()))
    yield
    del MODEL_REGISTRY["linear"]


def test_an_architecture_is_added_by_one_registration(linear, tiny_npz, tmp_path):
    summary = pipeline(model_type="linear", data=tiny_npz, max_epochs=1, output_dir=tmp_path).run_complete_pipeline()
    assert summary["best_model"] == "linear"
    with pytest.raises(ConfigError, match="taken"):
        register_model("linear", ModelSpec(Linear))


@pytest.mark.long
def test_an_architecture_says_itself_what_is_searched_ranges_too(linear, tiny_npz, tmp_path):
    settings = {"enable_optuna": True, "num_optuna_trials": 3, "search_epochs": 1, "image_size": 16}
    made = pipeline(model_type="linear", data=tiny_npz, output_dir=tmp_path, **settings)
    first, *others = made.search("linear").trials
    assert (first.parameters["width"], first.parameters["slope"]) == (8, 0.1)  # the defaults of the class
    assert all(0.01 <= trial.parameters["slope"] <= 0.3 for trial in others)
    assert len({trial.parameters["slope"] for trial in others}) == 2  # drawn from a range, not from a list
    found = made.search_and_train("linear")
    weights = torch.load(made.config.checkpoints_dir / "linear" / found.checkpoint, weights_only=True)
    assert weights["hyper_parameters"]["slope"] == found.parameters["slope"]


def test_a_configuration_without_a_registered_model_says_what_to_import():
    code = "from waferlab.config import ExperimentConfig; ExperimentConfig()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "ConfigError" in done.stderr.splitlines()[-1]
    assert "import integrated_pipeline first" in done.stderr.splitlines()[-1]


def test_all_means_the_four_families():
    four = ["lightning_cnn", "torchvision_resnet", "torchvision_efficientnet", "yolo_inspired"]
    assert ExperimentConfig().model_types() == four


def test_parameters_of_a_trial_replace_the_defaults_and_unknown_ones_are_named():
    model = pipeline().create_model("lightning_cnn", {"base_channels": 16, "learning_rate": 0.5, "batch_size": 64})
    assert model.network[0].out_channels == 16 and model.learning_rate == 0.5
    with pytest.raises(ConfigError, match="no parameter 'depth'"):
        pipeline().create_model("lightning_cnn", {"depth": 3})
    with pytest.raises(ConfigError, match="'alexnet' is unknown"):
        pipeline().create_model("alexnet")

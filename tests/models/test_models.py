"""Promises about the models: one interface, honest pre-trained weights, safe loading."""

import http.server
import os
import threading
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from integrated_pipeline import DEFAULT_MODEL_TYPES, MODEL_REGISTRY, IntegratedMLPipeline, ModelSpec, register_model
from simple_model import LightningCNN
from waferlab.config import ExperimentConfig
from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.errors import ConfigError, WeightsUnavailableError
from waferlab.models.classifier import WaferClassifier, macro_f1
from waferlab.models.starting_weights import fetch_weights, read_weights
from waferlab.models.torchvision_models import TorchvisionLightningModel
from waferlab.models.yolo import YOLOLightningAdapter, import_ultralytics_tasks, ultralytics_classes


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
        assert (logits < 0).any()  # logits, not probabilities


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


def test_the_head_has_512_units_and_the_asked_dropout():
    for architecture in ("resnet18", "efficientnet_b0"):
        head = list(TorchvisionLightningModel(architecture=architecture, dropout=0.37).network.children())[-1]
        assert [m.out_features for m in head.modules() if isinstance(m, nn.Linear)] == [512, 9]
        assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.37]


# --- the factory


def test_an_architecture_is_added_by_one_registration(tiny_npz, tmp_path, monkeypatch):
    class Linear(WaferClassifier):
        def __init__(self, *, width=8, **training):
            super().__init__(**training)
            self.save_hyperparameters()
            self.network = nn.Sequential(
                nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 9)
            )

    monkeypatch.delitem(MODEL_REGISTRY, "linear", raising=False)  # it goes again when the test ends
    register_model("linear", ModelSpec(Linear, search_space={"width": (8, 16)}))
    summary = pipeline(model_type="linear", data=tiny_npz, max_epochs=1, output_dir=tmp_path).run_complete_pipeline()
    assert summary["best_model"] == "linear"
    with pytest.raises(ConfigError, match="taken"):
        register_model("linear", ModelSpec(Linear))


def test_all_means_the_four_families():
    assert ExperimentConfig().model_types() == list(DEFAULT_MODEL_TYPES)
    assert DEFAULT_MODEL_TYPES == ("lightning_cnn", "torchvision_resnet", "torchvision_efficientnet", "yolo_inspired")


def test_parameters_of_a_trial_replace_the_defaults_and_unknown_ones_are_named():
    model = pipeline().create_model("lightning_cnn", {"base_channels": 16, "learning_rate": 0.5, "batch_size": 64})
    assert model.network[0].out_channels == 16 and model.learning_rate == 0.5
    with pytest.raises(ConfigError, match="no parameter 'depth'"):
        pipeline().create_model("lightning_cnn", {"depth": 3})
    with pytest.raises(ConfigError, match="'alexnet' is unknown"):
        pipeline().create_model("alexnet")


# --- pre-trained weights


def same_but_head(network, state, *, first, head):
    ours = network.state_dict()
    assert torch.equal(ours.pop(first), state[first].sum(1, keepdim=True))
    for name, value in ours.items():
        if not name.startswith(head):
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("architecture", "first", "head"),
    [("resnet18", "conv1.weight", "fc."), ("efficientnet_b0", "features.0.0.weight", "classifier.")],
)
def test_torchvision_weights_arrive_tensor_by_tensor(architecture, first, head, tmp_path, monkeypatch):
    import torchvision.models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(3)
    published = torchvision.models.get_model(architecture)
    weights = torchvision.models.get_model_weights(architecture).DEFAULT
    cache = tmp_path / "checkpoints" / os.path.basename(weights.url)
    cache.parent.mkdir()
    torch.save(published.state_dict(), cache)
    model = TorchvisionLightningModel(architecture=architecture, pretrained=True)
    assert model.weights_source == f"torchvision {weights}"
    same_but_head(model.network, published.state_dict(), first=first, head=head)


def test_the_grey_first_layer_answers_as_the_rgb_one_does_to_three_equal_channels():
    import torchvision.models

    published = torchvision.models.resnet18()
    model = TorchvisionLightningModel(architecture="resnet18")
    model.adopt(published.state_dict())
    grey = torch.rand(2, 1, 32, 32)
    assert torch.allclose(model.network.conv1(grey), published.conv1(grey.expand(-1, 3, -1, -1)), atol=1e-5)


def test_ultralytics_weights_arrive_tensor_by_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published = import_ultralytics_tasks().ClassificationModel("yolo11n-cls.yaml", ch=3, nc=1000, verbose=False)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": published.half(), "ema": None}, tmp_path / "checkpoints" / "yolo11n-cls.pt")
    model = YOLOLightningAdapter(pretrained=True)
    assert model.weights_source == "ultralytics yolo11n-cls.pt"
    same_but_head(model.network, published.float().state_dict(), first="model.0.conv.weight", head="model.10.linear.")


def test_a_weights_file_that_asks_for_other_code_is_refused_before_it_runs(tmp_path):
    proof = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    torch.save({"model": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(WeightsUnavailableError, match="cannot be loaded safely"):
        read_weights(tmp_path / "bad.pt", allowed=ultralytics_classes())
    assert not proof.exists()


def test_without_weights_the_model_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_host(url, file, *, wait, hash_prefix=None):
        raise WeightsUnavailableError("no answer")

    monkeypatch.setattr("waferlab.models.torchvision_models.fetch_weights", no_host)
    assert TorchvisionLightningModel(pretrained=True).weights_source == "random (no answer)"
    assert YOLOLightningAdapter(pretrained=True).weights_source == "random (no answer)"


def test_a_host_that_swallows_packets_costs_the_bounded_wait_only(tmp_path):
    import socket

    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        started = time.monotonic()
        with pytest.raises(WeightsUnavailableError, match="does not answer"):
            fetch_weights(url, tmp_path / "weights.pth", wait=0.5)
        assert time.monotonic() - started < 30  # no speed promise: only that it ends
    assert not (tmp_path / "weights.pth").exists()


def test_a_host_that_answers_fills_the_cache_and_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    torch.save({"weight": torch.ones(3)}, served / "w.pth")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/w.pth"
    try:
        file = fetch_weights(url, tmp_path / "cache" / "w.pth", wait=10)
        assert torch.equal(read_weights(file)["weight"], torch.ones(3))
        with pytest.raises(WeightsUnavailableError, match="hash"):
            fetch_weights(url, tmp_path / "cache" / "other.pth", wait=10, hash_prefix="0000")
        assert not (tmp_path / "cache" / "other.pth").exists()
    finally:
        server.shutdown()
        server.server_close()

"""Promises about pre-trained weights: they arrive whole, are loaded safely, and where there are none it is said."""

import http.server
import os
import threading
from pathlib import Path

import pytest
import torch

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.errors import WeightsUnavailableError
from waferlab.models.starting_weights import fetch_weights, read_weights, start_from
from waferlab.models.torchvision_models import TorchvisionLightningModel
from waferlab.models.yolo import YOLOLightningAdapter, import_ultralytics_tasks, ultralytics_classes
from waferlab.records import StartingWeights


def start(model):
    """What came of starting from published weights."""
    return start_from(model, model_type="any", source="imagenet", wait=1, folder=Path("nowhere"), image_size=32)


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
    model = TorchvisionLightningModel(architecture=architecture)
    assert start(model) == StartingWeights("published", f"torchvision {weights}")
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
    model = YOLOLightningAdapter()
    assert start(model) == StartingWeights("published", "ultralytics yolo11n-cls.pt")
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

    for room in ("torchvision_models", "yolo"):
        monkeypatch.setattr(f"waferlab.models.{room}.fetch_weights", no_host)
    for model_type in ("torchvision_resnet", "yolo_inspired"):
        config = ExperimentConfig(pretrained_source="imagenet", enable_mlflow=False, quiet=True)
        model = IntegratedMLPipeline(config).create_model(model_type)
        assert model.starting_weights == StartingWeights("random", reason="no answer")
        assert str(model.starting_weights) == "random (no answer)"


def test_a_host_that_swallows_packets_costs_the_bounded_wait_only(tmp_path):
    import socket

    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        with pytest.raises(WeightsUnavailableError, match="does not answer"):
            fetch_weights(url, tmp_path / "weights.pth", wait=0.5)
        silent.settimeout(10)
        silent.accept()[0].close()
        with pytest.raises(WeightsUnavailableError, match="does not answer"):  # of the next training
            fetch_weights(url, tmp_path / "weights.pth", wait=0.5)
        silent.settimeout(0.2)
        with pytest.raises(TimeoutError):  # which did not ask again
            silent.accept()
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

import pytest

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.deployment.onnx_export import export_onnx


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A small exported file, of a network that has learnt nothing."""
    config = ExperimentConfig(use_pretrained=False, image_size=16)
    network = IntegratedMLPipeline(config).create_model("lightning_cnn").eval()
    return export_onnx(network, tmp_path_factory.mktemp("model") / "model.onnx", image_size=16)

"""What the tests of this room share: exporting a network takes longer than most tests."""

from functools import cache

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A function from a model type to the file that `test_onnx_export.model_of` gives for 32 pixels."""
    from deployment.test_onnx_export import model_of

    from waferlab.deployment.onnx_export import export_onnx

    @cache
    def export(model_type):
        return export_onnx(model_of(model_type), tmp_path_factory.mktemp(model_type) / "model.onnx", image_size=32)

    return export

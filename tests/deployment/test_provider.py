"""Promises about what computes: the provider that was asked for, or a sentence; never another one in silence."""

import onnxruntime
import pytest
from made_up_models import write_file

import predict
from waferlab.deployment.predictor import PROVIDERS, Predictor
from waferlab.errors import ModelError


@pytest.fixture
def file(tmp_path):
    return write_file(tmp_path / "model.onnx")


def test_the_cpu_computes_unless_something_else_is_asked_for(file):
    assert Predictor(file)._session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_a_sentence(provider, file, monkeypatch, capsys):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(ModelError, match=rf"--provider {provider}: this ONNX Runtime has Azure.* onnxruntime-gpu"):
        Predictor.load(file, provider=provider)
    monkeypatch.setattr("sys.argv", ["predict.py", "synthetic", "--model", str(file), "--provider", provider])
    assert predict.main() == 2
    assert f"error: --provider {provider}" in capsys.readouterr().err


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_does_not_start_is_a_sentence_where_onnx_runtime_would_go_on_without(
    provider, file, monkeypatch
):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS[provider])
    with pytest.raises(ModelError, match=rf"--provider {provider} does not start here: ONNX Runtime took CPU"):
        Predictor(file, provider=provider)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_answers_as_the_cpu_does(provider, file):
    import numpy as np

    if PROVIDERS[provider][0] not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {PROVIDERS[provider][0]}")
    maps = [np.random.default_rng(seed).integers(0, 3, (20, 25)).astype(np.uint8) for seed in range(20)]
    of_cpu, of_gpu = (Predictor(file, provider=one).probabilities(maps) for one in ("cpu", provider))
    np.testing.assert_allclose(of_gpu, of_cpu, atol=1e-3)

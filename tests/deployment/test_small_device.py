"""Promises about forms for small devices: smaller, answering alike, and each says what it cost."""

import itertools
import json
import sys

import numpy as np
import onnxruntime
import pytest
from made_up_model import NAMES, wafer, write_model

from waferlab.data.maps import CLASS_NAMES
from waferlab.deployment import small_device
from waferlab.deployment.explain import Explainer
from waferlab.deployment.predictor import Predictor
from waferlab.errors import ConfigError, ModelError

FORMS = ("float, onnx", "float, ort", "8-bit, onnx", "8-bit, ort")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["small_device", *map(str, arguments)])
    return small_device.main()


@pytest.fixture(scope="module")
def maps(tiny_maps):
    return [tiny_maps[i] for i in range(0, len(tiny_maps), 3)]


@pytest.fixture(scope="module")
def forms(exported, maps, tmp_path_factory):
    return small_device.make_forms(exported("lightning_cnn"), maps, tmp_path_factory.mktemp("device"))


def test_the_same_in_onnx_runtimes_own_format_answers_the_same(forms, maps):
    for kind in ("float", "8-bit"):
        there, here = (Predictor(forms[f"{kind}, {ending}"]).probabilities(maps) for ending in ("onnx", "ort"))
        np.testing.assert_allclose(here, there, atol=1e-5)


def test_in_8_bits_a_file_is_less_than_half_as_large_and_answers_nearly_the_same(forms, maps):
    whole, small = (forms[f"{kind}, onnx"] for kind in ("float", "8-bit"))
    assert small.stat().st_size < whole.stat().st_size / 2
    before, after = (Predictor(file).probabilities(maps) for file in (whole, small))
    assert 0 < np.abs(after - before).mean() < 0.02


def test_each_says_of_itself_what_the_model_did_but_for_sets_that_were_calibrated_on_the_other(tmp_path, maps):
    file = write_model(tmp_path / "model.onnx")
    forms = small_device.make_forms(file, maps, tmp_path / "device")
    whole, small = (Predictor(forms[f"{kind}, ort"]) for kind in ("float", "8-bit"))
    assert whole.class_names == small.class_names == NAMES
    assert whole.sets is not None and small.sets is None
    assert not small.predict([wafer(0.5)]).abstains.any()


def test_what_a_small_build_of_the_runtime_has_to_know_lies_beside_them(forms):
    said = (forms["8-bit, ort"].parent / small_device.OPERATORS).read_text()
    assert "QuantizeLinear" in said or "QLinearConv" in said
    assert str(forms["8-bit, ort"].parent.parent) not in said


@pytest.mark.long
def test_a_table_says_bytes_milliseconds_and_what_each_form_costs_on_labelled_maps(
    exported, tiny_npz, tmp_path, monkeypatch, capsys
):
    flags = ("--model", exported("lightning_cnn"), "--output", tmp_path / "device")
    assert run(monkeypatch, tiny_npz, *flags, "--score", tiny_npz) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "device/forms.json").read_text())
    assert tuple(found) == FORMS and all(form in said for form in FORMS) and "macro F1" in said
    assert "only lots new to it tell" in said
    for values in found.values():
        assert values["maps"] == 360 and values["ms_a_map"] > 0 and 0 <= values["other_class"] < 0.2
    assert found["float, onnx"]["against_first"]["difference"] == found["float, onnx"]["other_class"] == 0
    assert run(monkeypatch, tiny_npz, *flags) == 0
    assert "macro F1" not in capsys.readouterr().out, "without labels there is nothing to score"


def test_each_map_of_a_source_has_the_same_chance_to_give_the_ranges(tiny_npz, monkeypatch):
    monkeypatch.setattr(small_device, "MOST_MAPS", 40)
    kept = small_device.maps_of(str(tiny_npz))
    assert len(kept) == 40
    with np.load(tiny_npz) as arrays:
        dies, offsets = arrays["maps_flat"], arrays["offsets"]
    first = [dies[start:stop] for start, stop in itertools.pairwise(offsets[:41])]
    still = sum(any(np.array_equal(one.ravel(), other) for other in first) for one in kept)
    assert 0 < still < 20, "40 of 360 were drawn; the first 40 are a ninth of them"


def test_what_cannot_be_done_is_one_message_and_status_2(exported, tiny_npz, tmp_path, monkeypatch, capsys):
    model = exported("lightning_cnn")
    assert run(monkeypatch, tmp_path / "nowhere.npz", "--model", model, "--output", tmp_path / "device") == 2
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Give some"):
        small_device.make_forms(model, [], tmp_path / "device")
    assert not (tmp_path / "device").exists()
    foreign = write_model(tmp_path / "model.onnx")
    small_device.make_forms(foreign, [wafer(0.5)], tmp_path / "device")
    (tmp_path / "loc").mkdir()
    labels = np.full(40, "Loc")
    np.savez(tmp_path / "loc.npz", maps=np.full((40, 9, 9), 1, np.uint8), labels=labels)
    assert "Loc" in CLASS_NAMES and "Loc" not in NAMES
    status = run(
        monkeypatch, tiny_npz, "--model", foreign, "--output", tmp_path / "out", "--score", tmp_path / "loc.npz"
    )
    assert status == 2 and "not one map has a class that the model knows: none, Random" in capsys.readouterr().err


def test_to_look_into_a_model_takes_its_onnx_file(forms):
    with pytest.raises(ModelError, match="gives answers alone"):
        Explainer(Predictor(forms["float, ort"]))


def test_a_form_is_not_made_of_a_form(forms, tiny_npz, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tiny_npz, "--model", forms["float, ort"], "--output", tmp_path / "out") == 2
    assert "takes its .onnx file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_runtime_computes_in_8_bits(forms):
    assert onnxruntime.InferenceSession(str(forms["8-bit, ort"])).get_modelmeta().custom_metadata_map["class_names"]
    import onnx

    kinds = [node.op_type for node in onnx.load(forms["8-bit, onnx"]).graph.node]
    assert kinds.count("QuantizeLinear") >= 5

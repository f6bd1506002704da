"""Promises about the exported file: it answers as the model does, whatever the maps' sizes, and says what it is."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployment.made_up_model import write_model
from onnx import TensorProto, helper, numpy_helper

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.data.images import resize_maps
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.deployment.onnx_export import RawMapClassifier, export_onnx
from waferlab.deployment.predictor import Predictor
from waferlab.errors import ModelError
from waferlab.evaluation.conformal import COVERAGES, PredictionSets
from waferlab.evaluation.decision import Decision
from waferlab.evaluation.inference import predict_probabilities


def model_of(model_type):
    torch.manual_seed(0)
    config = ExperimentConfig(use_pretrained=False, image_size=32)
    model = IntegratedMLPipeline(config).create_model(model_type).eval()
    for module in model.modules():  # as after training: no statistic at its start value
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def a_small_network():
    """Exported in a second, for promises that any network shows."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(16, 9)).eval()


def decision_for(model_type, model, maps):
    """With which half of the maps are answered by one view; by one view all, where that takes long to export."""
    if model_type not in ("lightning_cnn", "torchvision_resnet"):
        return Decision(temperature=0.7)
    of_one_view = predict_probabilities(model, resize_maps(maps, 32)[::9])
    return Decision(views=8, sure_at=float(np.median(of_one_view.max(1))), temperature=0.7)


@pytest.mark.long
@pytest.mark.parametrize("model_type", [*ExperimentConfig().model_types(), "vision_transformer"])
def test_the_file_answers_as_the_checkpoint_does_for_maps_of_all_sizes(model_type, tiny_npz, exported):
    model, maps = model_of(model_type), load_wafer_maps(tiny_npz)
    some, images = [maps[i] for i in range(0, len(maps), 9)], resize_maps(maps, 32)[::9]
    assert len({one.shape for one in some}) > 3
    decision, of_one_view = decision_for(model_type, model, maps), predict_probabilities(model, images)
    predictor = Predictor(exported(model_type))
    expected = predict_probabilities(model, images, decision)
    answered, features = predictor.outputs(some)
    np.testing.assert_allclose(answered, expected, atol=1e-4)
    np.testing.assert_allclose(answered.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(predictor.probabilities(some), answered)
    alone = [predictor.probabilities([one])[0] for one in some]  # no other map beside it, sure or not
    np.testing.assert_allclose(alone, expected, atol=1e-4)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    np.testing.assert_allclose(last(torch.from_numpy(features)).softmax(-1).detach(), of_one_view, atol=1e-4)


@pytest.mark.long
def test_the_decision_is_in_the_file(tiny_npz, tmp_path):
    model, maps = model_of("lightning_cnn"), load_wafer_maps(tiny_npz)
    offsets = tuple(np.linspace(-1, 1, 9).tolist())
    decision = Decision(views=8, prior_strength=0.5, offsets=offsets, temperature=1.7)
    expected = predict_probabilities(model, resize_maps(maps, 32)[::9], decision)
    plain = predict_probabilities(model, resize_maps(maps, 32)[::9])
    file = export_onnx(model, tmp_path / "model.onnx", image_size=32, decision=decision)
    answered = Predictor(file).probabilities([maps[i] for i in range(0, len(maps), 9)])
    np.testing.assert_allclose(answered, expected, atol=1e-4)
    assert np.abs(plain - expected).max() > 0.05


def test_one_map_large_or_small_goes_through(tmp_path):
    model = a_small_network()
    classifier = Predictor(export_onnx(model, tmp_path / "model.onnx", image_size=32))
    for shape in ((1, 22, 15), (1, 212, 204), (5, 32, 32)):
        maps = np.random.default_rng(0).integers(0, 3, shape, dtype=np.uint8)
        expected = RawMapClassifier(model, 32)(torch.from_numpy(maps))[0].detach()
        np.testing.assert_allclose(classifier.probabilities(list(maps)), expected, atol=1e-4)


def test_the_file_says_what_it_is_and_holds_no_other_file(tmp_path):
    file = export_onnx(a_small_network(), tmp_path / "model.onnx", image_size=32, split="abc")
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    about = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert about["split"] == "abc"
    assert "uint8 [N, rows, columns]" in about["contract"]
    assert Predictor(file).class_names == tuple(CLASS_NAMES)


def test_rubbish_is_named(tmp_path):
    classifier = Predictor(export_onnx(a_small_network(), tmp_path / "model.onnx", image_size=32))
    for wrong in (np.full((4, 4), 7, np.uint8), np.zeros((4, 4)), np.zeros(4, np.uint8), np.zeros((0, 0), np.uint8)):
        with pytest.raises(ValueError, match="Wanted: "):
            classifier.probabilities([np.ones((4, 4), np.uint8), wrong])
    (tmp_path / "no.onnx").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="no exported classifier"):
        Predictor(tmp_path / "no.onnx")


@pytest.mark.long
def test_the_same_model_gives_the_same_file_and_it_names_no_folder_of_this_machine(tmp_path):
    model = a_small_network()
    first, second = (export_onnx(model, tmp_path / name, image_size=32).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert first == second
    assert b".py" not in first and str(Path.home()).encode() not in first


def test_an_export_that_is_cut_off_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"of yesterday")
    monkeypatch.setattr("waferlab.tracking.whole_files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model_of("lightning_cnn"), file, image_size=16)
    assert file.read_bytes() == b"of yesterday" and list(tmp_path.iterdir()) == [file]


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_network_that_cannot_be_exported_is_named_with_the_reason(tmp_path, capfd):
    class Branching(torch.nn.Module):
        def forward(self, images):
            means = images.mean((1, 2, 3))
            return torch.stack([means] * 9, 1) * (2 if means.sum().item() > 0 else 1)

    with pytest.raises(ValueError, match=r"Branching cannot be exported \(.*data-dependent"):
        export_onnx(Branching(), tmp_path / "model.onnx", image_size=32)
    assert capfd.readouterr().err == ""


def test_a_file_whose_columns_are_not_its_classes_is_refused(tmp_path):
    file = export_onnx(a_small_network(), tmp_path / "model.onnx", image_size=32, class_names=CLASS_NAMES[:-1])
    with pytest.raises(ValueError, match="for the 8 classes that it names"):
        Predictor(file)


@pytest.mark.parametrize("where", ["../secret.bin", "/secret.bin", "link.bin"])
def test_a_file_from_a_stranger_reads_no_other_file(tmp_path, where):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(np.ones(1, np.float32).tobytes())
    (folder / "link.bin").symlink_to("../secret.bin")
    location = str(tmp_path / "secret.bin") if where.startswith("/") else where
    write_stranger(folder / "model.onnx", [helper.make_node("Mul", ["maps", "w"], ["probabilities"])], location)
    with pytest.raises(ValueError, match=r"no exported classifier.*xternal data"):
        Predictor(folder / "model.onnx")


OTHERS = PredictionSets(("x", "y", "z"), (20, 20, 20), tuple((0.2, 0.2, 0.2) for _ in COVERAGES)).as_text()


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"class_names": "[1, 2, 3]"}, "no names of their own"),
        ({"class_names": '["none", "none", "Random"]'}, "no names of their own"),
        ({"class_names": '"abc"'}, "no names of their own"),
        ({"class_names": "[" * 100_000}, "recursion"),
        ({"prediction_sets": OTHERS}, "of other classes"),
        ({"prediction_sets": '{"class_names": ["a"], "lots": [Infinity], "floors": []}'}, "infinity"),
    ],
)
def test_what_a_file_says_of_itself_is_looked_at(about, said, tmp_path):
    model = onnx.load(write_model(tmp_path / "model.onnx"))
    before = {one.key: one.value for one in model.metadata_props}
    del model.metadata_props[:]
    helper.set_model_props(model, before | about)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=f"no exported classifier.*{said}"):
        Predictor.load(tmp_path / "model.onnx")


@pytest.mark.parametrize("axis", [0, None])
def test_a_file_that_answers_other_than_it_says_is_no_model_to_answer_with(axis, tmp_path):
    model = onnx.load(write_model(tmp_path / "model.onnx"))
    model.graph.node[-1].output[0] = "soft"
    if axis is None:
        model.graph.node.append(helper.make_node("Log", ["below"], ["probabilities"]))
        model.graph.node.insert(-1, helper.make_node("Sub", ["soft", "soft"], ["below"]))
        said = "no numbers"
    else:
        model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
        model.graph.node.append(helper.make_node("ReduceMean", ["soft", "axis"], ["probabilities"]))
        said = r"\(1, 3\)"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=f"answers {said} to 2 maps, where"):
        Predictor.load(tmp_path / "model.onnx").predict([np.ones((5, 5), np.uint8)] * 2)


def test_a_file_from_a_stranger_brings_no_operators_of_its_own(tmp_path):
    write_stranger(tmp_path / "model.onnx", [helper.make_node("Own", ["maps"], ["probabilities"], domain="stranger")])
    with pytest.raises(ValueError, match=r"no exported classifier.*not a registered function"):
        Predictor(tmp_path / "model.onnx")


def test_a_file_from_a_stranger_that_asks_for_more_memory_than_there_is_gets_a_sentence(tmp_path):
    nodes = [
        helper.make_node("Cast", ["maps"], ["numbers"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["numbers"], ["one"], keepdims=0),
        helper.make_node("Mul", ["one", "million"], ["sides"]),
        helper.make_node("ConstantOfShape", ["sides"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["probabilities"], keepdims=1),
    ]
    million = numpy_helper.from_array(np.array([10**6, 10**6]), "million")
    maps = (TensorProto.UINT8, ["maps", "rows", "columns"])
    write_stranger(tmp_path / "model.onnx", nodes, more=[million], maps=maps)
    predictor = Predictor.load(tmp_path / "model.onnx")
    assert predictor.predict([np.zeros((5, 6), np.uint8)]).probabilities.tolist() == [[0.0]]  # nothing times a million
    with pytest.raises(ModelError, match=r"gives no answer to 1 maps of 5x6 \(.*memory"):
        predictor.predict([np.ones((5, 6), np.uint8)])


def write_stranger(path, nodes, location=None, more=(), maps=(TensorProto.FLOAT, ["maps", 1])):
    """A file for one class, made by hand; its weight may lie in another file."""
    weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
    if location is not None:
        onnx.external_data_helper.set_external_data(weight, location)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
    graph = helper.make_graph(
        nodes, "stranger",
        [helper.make_tensor_value_info("maps", *maps)],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["maps", 1])],
        [weight, *more],
    )  # fmt: skip
    operators = [helper.make_opsetid("", 18), helper.make_opsetid("stranger", 1)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=10)
    helper.set_model_props(model, {"class_names": '["one"]'})
    path.write_bytes(model.SerializeToString())

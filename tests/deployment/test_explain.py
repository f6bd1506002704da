"""Promises about explanations: they are the network's own gradients, lie where it looks, turn with the wafer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from deployment.test_onnx_export import model_of
from made_up_predictions import assert_is_a_picture
from torch import nn

from waferlab.config import ExperimentConfig
from waferlab.data.images import encode, resize_dies, symmetries
from waferlab.deployment.explain import Explainer, explain_maps
from waferlab.deployment.onnx_export import export_onnx
from waferlab.deployment.predictor import Predictor
from waferlab.errors import ModelError
from waferlab.evaluation.decision import Decision
from waferlab.evaluation.deletion import area_between, deletion_curves

ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS = {  # where the side is a quarter of the image's for the last time
    "lightning_cnn": lambda model: model.network[4],
    "torchvision_resnet": lambda model: model.network.layer1,
    "torchvision_efficientnet": lambda model: model.network.features[3][0].block[0],
    "yolo_inspired": lambda model: model.network.model[2],
}


def some_map(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 3, shape, dtype=np.uint8)


def explainer(file):
    return Explainer(Predictor(file))


def by_torch(model, layer, one_map, output, image_size=32):
    """HiResCAM as its authors define it, with PyTorch's gradients, float32 [h, w]."""
    views = torch.cat(list(symmetries(encode(resize_dies(torch.from_numpy(one_map)[None], image_size)))))
    kept = []
    hook = layer.register_forward_hook(lambda _module, _inputs, out: kept.append(out))
    logits = model(views)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, output].sum(), kept[0])
    parts = (kept[0] * gradient).sum(1).detach()
    turned_back = [(one.flip(-1) if i % 2 else one).rot90(-(i // 2)) for i, one in enumerate(parts)]
    return torch.stack(turned_back).mean(0).numpy()


def upsampled(relevance, one_map):
    sides = torch.from_numpy(relevance)[None, None]
    return nn.functional.interpolate(sides, one_map.shape, mode="bilinear")[0, 0].numpy() * (one_map > 0)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.long
@pytest.mark.parametrize("model_type", ExperimentConfig().model_types())
def test_relevance_is_what_pytorchs_own_gradients_give(model_type, exported):
    model, one_map = model_of(model_type), some_map(30, 37)
    found = explainer(exported(model_type)).relevance(one_map, 2)
    expected = upsampled(by_torch(model, LAYERS[model_type](model), one_map, output=2), one_map)
    assert found.dtype == np.float32 and np.abs(expected).max() > 0
    assert_close(found, expected)


class Mixture(nn.Module):
    """What networks of others are made of: pools that overlap or leave a rest, branches, attention, broadcasts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
        self.coarser = nn.ModuleList(  # from 17 pixels to 4, less than a quarter
            [
                nn.Conv2d(6, 6, 3, stride=5, padding=2, groups=3, dilation=2),
                nn.MaxPool2d(7, 5, 3),
                nn.AvgPool2d(7, 5, 3, count_include_pad=False),
                nn.AvgPool2d(5, ceil_mode=True),
            ]
        )
        self.linear = nn.Linear(24, 9)

    def forward(self, images):
        first = self.first(images)
        together = torch.cat([layer(first) for layer in self.coarser], 1)
        pixels = together.flatten(2)
        seen = (pixels.transpose(1, 2) @ pixels / 9).softmax(-1)
        attended = (pixels @ seen).reshape(together.shape) * together.mean((2, 3), keepdim=True).sigmoid()
        return self.linear(attended.amax((2, 3)) + together.mean((2, 3)))


def test_networks_of_other_kinds_are_explained_too_with_views_in_the_file_and_classes_left_out(tmp_path):
    torch.manual_seed(0)
    model, one_map, decision = Mixture().eval(), some_map(21, 24), Decision(views=8, left_out=(0, 3))
    file = export_onnx(model, tmp_path / "model.onnx", image_size=17, decision=decision)
    expected = by_torch(model, model.first, one_map, output=4, image_size=17)
    assert_close(explainer(file).relevance(one_map, 2), upsampled(expected, one_map))


def test_a_wafer_turned_has_its_relevance_turned(exported):
    explain, one_map = explainer(exported("lightning_cnn")).relevance, some_map(30, 37)
    expected = explain(one_map, 1)
    assert_close(explain(np.rot90(one_map), 1), np.rot90(expected))
    assert_close(explain(one_map[::-1], 1), expected[::-1])


CORNER = """
<ir_version: 10, opset_import: ["": 18]>
corner (uint8[maps, 16, 16] maps) => (float[maps, 2] probabilities)
<float[maps, 2, 16, 16] dies, float[maps, 2] logits, int64[1] one = {1}, int64[1] rest = {512}>
{
    levels = Cast <to = 1> (maps)
    image = Unsqueeze (levels, one)
    both = Concat <axis = 1> (image, image)
    dies = Relu (both)
    many = Shape <end = 1> (maps)
    flat = Concat <axis = 0> (many, rest)
    seen = Reshape (dies, flat)
    row = Identity (seen)
    logits = Gemm (row, weights)
    probabilities = Softmax (logits)
}
"""


def write_corner(file, kind="Identity"):
    """A network, made by hand, for which class 1 is a matter of the dies in the upper left corner of the map.

    Its row of numbers is as long as the shape of its input says, as older exporters write it.
    """
    model = onnx.parser.parse_model(CORNER.replace("Identity", kind))
    weights = np.zeros((2, 16, 16, 2), dtype=np.float32)
    weights[0, :4, :4, 1] = 0.05
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights.reshape(-1, 2), "weights"))
    onnx.helper.set_model_props(model, {"class_names": '["any", "corner"]', "image_size": "16"})
    onnx.save(model, file)
    return file


def test_relevance_lies_where_the_network_looks_and_nowhere_else(tmp_path):
    one_map = np.full((16, 16), 2, dtype=np.uint8)
    one_map[0, 0] = 0
    explain = explainer(write_corner(tmp_path / "model.onnx")).relevance
    found, at_the_edges = explain(one_map, 1), [0, 1, 2, 3, 12, 13, 14, 15]
    corners = np.zeros((16, 16), dtype=bool)
    corners[np.ix_(at_the_edges, at_the_edges)] = True  # it is shown the map in its eight views
    assert found[0, 0] == 0  # no die
    corners[0, 0] = False
    assert (found[corners] > 0).all() and (found[~corners] == 0).all()
    assert not explain(one_map, 0).any()


class Attending(nn.Module):
    """A transformer of one layer on patches of 8x8 pixels."""

    def __init__(self):
        super().__init__()
        self.patches, self.classify = nn.Conv2d(1, 16, 8, 8), nn.Linear(16, 9)
        self.attend = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, images):
        return self.classify(self.attend(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


def test_a_network_that_cannot_be_explained_is_named_with_the_reason_and_the_remedy(tmp_path):
    attending = export_onnx(Attending().eval(), tmp_path / "attending/model.onnx", image_size=32)
    with pytest.raises(ModelError, match=r"model.onnx cannot be explained: no activation .*Leave out --explain"):
        explainer(attending)
    odd = write_corner(tmp_path / "model.onnx", kind="Cos")
    with pytest.raises(ModelError, match=r"no gradient for nodes of the kind Cos"):
        explainer(odd)


def test_a_map_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Wanted: "):
        explainer(write_corner(tmp_path / "model.onnx")).relevance(np.full((3, 3), 7, dtype=np.uint8), 0)


def test_dies_taken_away_by_relevance_cost_the_answer_more_than_dies_at_random(tmp_path):
    predictor, one_map = Predictor(write_corner(tmp_path / "model.onnx")), some_map(16, 16)
    relevance = Explainer(predictor).relevance(one_map, 1)
    by_relevance, at_random = deletion_curves(predictor.probabilities, one_map, relevance, 1)
    assert area_between(by_relevance, at_random) > 0.3 * (by_relevance[0] - by_relevance[-1])


def test_maps_are_drawn_with_what_spoke_for_their_class_a_dozen_to_a_page(tmp_path):
    maps = [some_map(16, 16, seed=seed) for seed in range(13)]
    pages = explain_maps(Predictor(write_corner(tmp_path / "model.onnx")), maps, folder=tmp_path / "pages")
    assert [page.name for page in pages] == ["relevance_1.png", "relevance_2.png"]
    for page in pages:
        assert_is_a_picture(page)
    (tmp_path / "pages/relevance_before.png").touch()  # which is none of ours
    explain_maps(Predictor(tmp_path / "model.onnx"), maps[:2], folder=tmp_path / "pages")
    left = {page.name for page in (tmp_path / "pages").iterdir()}
    assert left == {"relevance_1.png", "relevance_before.png"}  # of the second page, none is left


def test_explaining_needs_no_torch():
    code = "import sys, waferlab.deployment.explain, waferlab.reports.explain_figures;"
    code += "sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "about",
    [{"image_size": "abc"}, {"answered": "[0, 1]"}, {"answered": "[99, 1, 2, 3, 4, 5, 6, 7, 8]"}, {"answered": "7"}],
)
def test_a_network_whose_file_says_nonsense_of_it_is_not_explained(about, exported, tmp_path):
    model = onnx.load(exported("lightning_cnn"))
    before = {one.key: one.value for one in model.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, before | about)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="cannot be explained"):
        Explainer(Predictor(tmp_path / "model.onnx"))

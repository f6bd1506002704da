"""Models without a network, which go by the share of failing dies: an exported file, and one that answers at once."""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from waferlab.data.maps import CLASS_NAMES
from waferlab.deployment.predictor import Answers
from waferlab.evaluation.conformal import PredictionSets

CLASSES = len(CLASS_NAMES)
CENTRES = np.arange(1, CLASSES + 1) / 12  # of the share of failing dies, by which the made-up classes differ
SETS = PredictionSets(CLASS_NAMES, (30,) * CLASSES, ((0.11,) * CLASSES,) * 50)


def write_file(path, *, shift=0.0, names=CLASS_NAMES, roll=0, scale=2000.0, **about):
    """A classifier that goes by the share of failing dies: perfect, or with its classes' centres shifted."""
    centres = CENTRES + shift + 1  # the mean of a map, whose dies are 1 or 2
    order = np.roll(np.arange(CLASSES), roll)[: len(names)]
    weights, offsets = (a[order].astype(np.float32)[None] for a in (2 * scale * centres, -scale * centres**2))
    nodes = [
        helper.make_node("Cast", ["maps"], ["dies"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["dies", "axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["column"]),
        helper.make_node("Mul", ["column", "weights"], ["weighted"]),
        helper.make_node("Add", ["weighted", "offsets"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = {"axes": np.array([1, 2]), "last": np.array([1]), "weights": weights, "offsets": offsets}
    graph = helper.make_graph(
        nodes, "made_up",
        [helper.make_tensor_value_info("maps", TensorProto.UINT8, ["maps", "rows", "columns"])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["maps", len(names)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"class_names": json.dumps(list(names))} | about)
    onnx.save(model, path)
    return path


class ByShare:
    """Answers by the share of failing dies: class 0 without any, class 8 with nothing else; sure of it or less so."""

    class_names, name, sha256 = CLASS_NAMES, "by share", "0" * 64

    def __init__(self, sets=SETS):
        self.sets, self.asked = sets, []

    def predict(self, maps, *, coverage):
        self.asked.append(len(maps))
        shares = np.array([(one == 2).mean() for one in maps])
        near = 1 / (0.01 + np.abs(shares[:, None] - np.arange(9) / 8)) ** 2
        probabilities = (near / near.sum(1, keepdims=True)).astype(np.float32)
        held = None if self.sets is None else self.sets.sets(probabilities, coverage)
        return Answers(CLASS_NAMES, probabilities, held, coverage)

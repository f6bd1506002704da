"""An exported file without a network, so that it is made in no time."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from waferlab.data.maps import CLASS_NAMES


def write_model(path):
    """A file that answers by three features: shares of failing and of present dies, and whether any die fails."""
    steps = [
        helper.make_node("Equal", ["maps", "two"], ["fails"]),
        helper.make_node("Cast", ["fails"], ["failing"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["maps"], ["dies"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["failing", "sides"], ["share"], keepdims=0),
        helper.make_node("ReduceMean", ["dies", "sides"], ["mean"], keepdims=0),
        helper.make_node("ReduceMax", ["failing", "sides"], ["any"], keepdims=0),
        *(helper.make_node("Unsqueeze", [name, "last"], [f"{name}_"]) for name in ("share", "mean", "any")),
        helper.make_node("Concat", ["share_", "mean_", "any_"], ["seen"], axis=1),
        helper.make_node("MatMul", ["seen", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    weights = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    constants = {"two": np.uint8(2), "sides": np.array([1, 2]), "last": np.array([1]), "weights": weights}
    graph = helper.make_graph(
        steps, "shares",
        [helper.make_tensor_value_info("maps", TensorProto.UINT8, ["n", "rows", "columns"])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 9])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(
        made, {"class_names": json.dumps(CLASS_NAMES), "features": "seen", "model_type": "lightning_cnn"}
    )
    onnx.save(made, path)

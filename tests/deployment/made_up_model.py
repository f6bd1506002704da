"""A model that can be foretold: its answer depends on the share of failing dies alone; and a service in a process."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from waferlab.evaluation.conformal import COVERAGES, PredictionSets

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("none", "Random", "Near-full")
SERVE = """
import sys
from waferlab.command_line import run
from waferlab.deployment.predictor import Predictor
from waferlab.deployment.service import serve
predictor = Predictor(sys.argv[1], threads=1)
status = run(lambda: serve(predictor, port=int(sys.argv[2])))
print("torch" in sys.modules or "lightning" in sys.modules)
sys.exit(status)
"""


def write_model(path, *, bias=(5, 3, -13), sets=True):
    """Answers none below a share of 0.1, Near-full above 0.8, Random between; close to 0.1 its set holds two."""
    tensors = {
        "two": np.array(2, np.uint8), "sides": np.array([1, 2]), "flat": np.array([-1, 1]),
        "weight": np.array([[-20, 0, 20]], np.float32), "bias": np.array(bias, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Equal", ["maps", "two"], ["fails"]),
        helper.make_node("Cast", ["fails"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers", "sides"], ["mean"]),
        helper.make_node("Reshape", ["mean", "flat"], ["share"]),
        helper.make_node("Gemm", ["share", "weight", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "made_up",
        [helper.make_tensor_value_info("maps", TensorProto.UINT8, ["maps", "rows", "columns"])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["maps", len(NAMES)])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    about = {"class_names": json.dumps(NAMES)}
    if sets:
        floors = tuple((0.2, 0.2, 0.2) for _ in COVERAGES)
        about["prediction_sets"] = PredictionSets(NAMES, (20, 20, 3), floors).as_text()
    helper.set_model_props(model, about)
    path.write_bytes(model.SerializeToString())
    return path


def wafer(share, shape=(10, 10)):
    """A map whose dies fail in this share."""
    dies = np.ones(shape, np.uint8)
    dies.flat[: round(share * dies.size)] = 2
    return dies


@contextlib.contextmanager
def served(model, port=0):
    """The process of a service, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, model, str(port)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process, re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.kill()
        process.communicate()

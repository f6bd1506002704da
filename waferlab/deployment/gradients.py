"""Gradients within an exported network: the nodes of the backward pass, written into the ONNX graph itself.

ONNX Runtime has no gradients outside of its training build, and tracing them with PyTorch takes several times as long
as the export and stores all weights again. A network's end needs few kinds of nodes, each of which has a rule here
(reverse-mode differentiation; the rules are those of calculus). A node without a rule is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Rule = Callable[["Backward", onnx.NodeProto, Sequence[str | None]], Sequence[str | None]]


class NoGradientError(ValueError):
    """The graph holds a node that there is no rule for."""


@dataclass
class Backward:
    """Adds the gradient of one tensor with respect to another to a graph.

    Attributes:
        model: whose graph gets the new nodes, at its end.
        shapes: of the tensors, by name, as the file gives them: a number, or None where it depends on the input.
    """

    model: onnx.ModelProto
    shapes: dict[str, tuple[int | None, ...]] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.shapes = {one.name: tuple(one.dims) for one in graph.initializer}
        for one in (*graph.input, *graph.output, *graph.value_info):
            self.shapes[one.name] = tuple(dim.dim_value or None for dim in one.type.tensor_type.shape.dim)
        self._made = 0

    def gradient(self, of: str, at: str, seed: str) -> str:
        """The name of a new tensor: the gradient at `at` of the sum of `of` times `seed`, which has its shape.

        Raises:
            NoGradientError: a node between the two has no rule.
        """
        depends, path = {at}, []
        for node in self.model.graph.node:
            if depends.intersection(node.input):
                depends.update(node.output)
                path.append(node)
        gradients = {of: seed}
        for node in reversed(path):
            given = [gradients.get(name) for name in node.output]
            if not any(given):
                continue
            if node.op_type not in RULES:
                raise NoGradientError(f"it has no gradient for nodes of the kind {node.op_type}")
            self._wanted = depends
            for name, part in zip(node.input, RULES[node.op_type](self, node, given), strict=False):
                if part is not None and name in depends:
                    gradients[name] = self.add("Add", gradients[name], part) if name in gradients else part
        if at not in gradients:
            raise NoGradientError(f"{of} does not depend on {at}")
        return gradients[at]

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or of its outputs if there are several."""
        self._made += 1
        names = [f"backward_{self._made}_{number}" for number in range(outputs)]
        self.model.graph.node.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Adds a constant and returns its name."""
        self._made += 1
        tensor = numpy_helper.from_array(np.asarray(value, dtype), f"backward_{self._made}")
        self.model.graph.initializer.append(tensor)
        self.shapes[tensor.name] = tuple(tensor.dims)
        return tensor.name

    def summed_like(self, gradient: str, name: str, broadcast: str) -> str:
        """The gradient of an operand that was broadcast to the shape of `broadcast`: summed where it was repeated."""
        small, large = self.shapes[name], self.shapes[broadcast]
        if len(small) != len(large):
            raise NoGradientError(f"it has no gradient where {len(small)} dimensions become {len(large)}")
        axes = [axis for axis, (a, b) in enumerate(zip(small, large, strict=True)) if a == 1 and b != 1]
        return self.add("ReduceSum", gradient, self.constant(axes, np.int64), keepdims=1) if axes else gradient

    def like(self, gradient: str, name: str) -> str:
        """The gradient in the shape of a tensor with as many elements."""
        return self.add("Reshape", gradient, self.add("Shape", name))

    def is_wanted(self, name: str) -> bool:
        """Whether a tensor depends on the one that the gradient is taken at; of the others none is needed."""
        return name in self._wanted


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _relu(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    zero = to.constant(0)
    return [to.add("Where", to.add("Greater", node.output[0], zero), given[0], zero)]


def _clip(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    out, zero, kept = node.output[0], to.constant(0), given[0]
    for kind, bound in zip(("Greater", "Less"), node.input[1:], strict=False):
        if bound:  # either may be left out
            kept = to.add("Where", to.add(kind, out, bound), kept, zero)
    return [kept]


def _pad(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    if _attributes(node).get("mode", b"constant") != b"constant" or len(node.input) > 3:
        raise NoGradientError("it has no gradient for this kind of Pad")
    return [to.add("Pad", given[0], to.add("Neg", node.input[1]))]


def _sigmoid(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    out = node.output[0]
    return [to.add("Mul", given[0], to.add("Mul", out, to.add("Sub", to.constant(1), out)))]


def _softmax(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    out, axis = node.output[0], _attributes(node).get("axis", -1)
    weighted = to.add("Mul", given[0], out)
    total = to.add("ReduceSum", weighted, to.constant([axis], np.int64), keepdims=1)
    return [to.add("Sub", weighted, to.add("Mul", out, total))]


def _add(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str | None]:
    return [to.summed_like(given[0], one, node.output[0]) if to.is_wanted(one) else None for one in node.input]


def _mul(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str | None]:
    return [
        to.summed_like(to.add("Mul", given[0], other), one, node.output[0]) if to.is_wanted(one) else None
        for one, other in zip(node.input, reversed(node.input), strict=True)
    ]


def _div(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    if to.is_wanted(node.input[1]):
        raise NoGradientError("it has no gradient for a division by an activation")
    return [to.add("Div", given[0], node.input[1])]


def _matmul(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str | None]:
    def turned(name: str) -> str:
        order = list(range(len(to.shapes[name])))
        return to.add("Transpose", name, perm=[*order[:-2], order[-1], order[-2]])

    left, right = node.input
    return [
        to.add("MatMul", given[0], turned(right)) if to.is_wanted(left) else None,
        to.add("MatMul", turned(left), given[0]) if to.is_wanted(right) else None,
    ]


def _gemm(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    about = _attributes(node)
    if about.get("transA", 0) or to.is_wanted(node.input[1]):
        raise NoGradientError("it has no gradient for a Gemm of two activations")
    turned = {"transB": 1 - about.get("transB", 0), "alpha": about.get("alpha", 1.0)}
    return [to.add("Gemm", given[0], node.input[1], **turned)]


def _identity(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    return [given[0]]


def _reshape(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    return [to.like(given[0], node.input[0])]


def _transpose(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    return [to.add("Transpose", given[0], perm=np.argsort(_attributes(node)["perm"]).tolist())]


def _split(to: Backward, node: onnx.NodeProto, given: Sequence[str | None]) -> list[str]:
    zero = to.constant(0)
    parts = [part or to.add("Mul", out, zero) for part, out in zip(given, node.output, strict=True)]
    return [to.add("Concat", *parts, axis=_attributes(node).get("axis", 0))]


def _concat(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    axis = _attributes(node)["axis"] % len(to.shapes[node.output[0]])
    lengths = to.add("Concat", *(to.add("Shape", one, start=axis, end=axis + 1) for one in node.input), axis=0)
    parts = to.add("Split", given[0], lengths, outputs=len(node.input), axis=axis)
    return [parts] if len(node.input) == 1 else parts


def _expanded(to: Backward, node: onnx.NodeProto, one: str) -> str:
    """A tensor in the shape of a reduction's output, repeated to that of its input."""
    if not _attributes(node).get("keepdims", 1):
        one = to.add("Unsqueeze", one, node.input[1])
    return to.add("Expand", one, to.add("Shape", node.input[0]))


def _reduce_mean(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    sizes = [to.add("Cast", to.add("Size", one), to=onnx.TensorProto.FLOAT) for one in (given[0], node.input[0])]
    return [to.add("Mul", _expanded(to, node, given[0]), to.add("Div", *sizes))]


def _reduce_max(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    """Shared evenly between the places that hold the maximum, as PyTorch's amax does."""
    highest = to.add("Equal", node.input[0], _expanded(to, node, node.output[0]))
    highest = to.add("Cast", highest, to=onnx.TensorProto.FLOAT)
    many = to.add("ReduceSum", highest, node.input[1], keepdims=_attributes(node).get("keepdims", 1))
    return [to.add("Mul", highest, _expanded(to, node, to.add("Div", given[0], many)))]


def _conv(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    return [_spread(to, node, given[0], node.input[1])]


def _batch_normalization(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    """Of trained statistics, which do not depend on the batch: each channel is multiplied by a constant."""
    _, scale, _, _, variance = node.input
    safe = to.add("Add", variance, to.constant(_attributes(node).get("epsilon", 1e-5)))
    factor = to.add("Div", scale, to.add("Sqrt", safe))
    return [to.add("Mul", given[0], to.add("Reshape", factor, to.constant([1, -1, 1, 1], np.int64)))]


def _average_pool(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    about, shape = _attributes(node), to.shapes[node.input[0]]
    counts = []
    for axis, (kernel, stride) in enumerate(zip(about["kernel_shape"], about["strides"], strict=True)):
        side, before, after = shape[axis + 2], about["pads"][axis], about["pads"][axis + 2]
        starts = np.arange(to.shapes[node.output[0]][axis + 2]) * stride - before
        ends = np.minimum(starts + kernel, side + after)
        if not about.get("count_include_pad", 0):
            starts, ends = np.maximum(starts, 0), np.minimum(ends, side)
        counts.append(ends - starts)
    shared = to.add("Div", given[0], to.constant(np.outer(*counts)))
    ones = to.constant(np.ones((shape[1], 1, *about["kernel_shape"])))
    return [_spread(to, node, shared, ones, group=shape[1])]


def _spread(to: Backward, node: onnx.NodeProto, gradient: str, weight: str, *, group: int | None = None) -> str:
    """A transposed convolution that ends at the size of the node's input, whatever its strides left over."""
    about, kernel = _attributes(node), to.shapes[weight][2:]
    if about.get("auto_pad", b"NOTSET") != b"NOTSET" or to.is_wanted(weight):
        raise NoGradientError(f"it has no gradient for this kind of {node.op_type}")
    strides, dilations = about.get("strides", [1, 1]), about.get("dilations", [1, 1])
    pads, more = list(about.get("pads", [0, 0, 0, 0])), [0, 0]
    sides = zip(to.shapes[node.input[0]][2:], to.shapes[node.output[0]][2:], strict=True)
    for axis, (wanted, had) in enumerate(sides):
        reached = strides[axis] * (had - 1) + dilations[axis] * (kernel[axis] - 1) + 1 - pads[axis] - pads[axis + 2]
        more[axis] = max(0, wanted - reached)
        pads[axis + 2] += max(0, reached - wanted)
    return to.add(
        "ConvTranspose", gradient, weight, strides=strides, dilations=dilations, pads=pads, output_padding=more,
        group=group or about.get("group", 1),
    )  # fmt: skip


def _max_pool(to: Backward, node: onnx.NodeProto, given: Sequence[str]) -> list[str]:
    """To the place of each maximum, by the places that MaxPool can give beside its values."""
    (image,) = node.input
    _, places = to.add("MaxPool", image, outputs=2, **_attributes(node))
    flat = to.constant([-1], np.int64)
    nothing = to.add("Mul", to.add("Reshape", image, flat), to.constant(0))
    both = (to.add("Reshape", one, flat) for one in (places, given[0]))
    return [to.like(to.add("ScatterElements", nothing, *both, reduction="add"), image)]


RULES: dict[str, Rule] = {
    "Add": _add, "AveragePool": _average_pool, "BatchNormalization": _batch_normalization, "Clip": _clip,
    "Concat": _concat, "Conv": _conv, "Div": _div, "Flatten": _reshape, "Gemm": _gemm, "Identity": _identity,
    "MatMul": _matmul, "MaxPool": _max_pool, "Mul": _mul, "Pad": _pad, "ReduceMax": _reduce_max,
    "ReduceMean": _reduce_mean, "Relu": _relu, "Reshape": _reshape, "Sigmoid": _sigmoid, "Softmax": _softmax,
    "Split": _split, "Transpose": _transpose,
}  # fmt: skip

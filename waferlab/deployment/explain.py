"""What an exported model looked at: relevance of each die for a class, without PyTorch and without a further file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from waferlab.deployment.gradients import Backward, NoGradientError
from waferlab.deployment.predictor import Predictor, check_map
from waferlab.errors import ModelError

MAPS_A_PAGE = 12


class Explainer:
    """HiResCAM of a predictor's network, as the mean over the eight views turned back.

    Relevance is the sum over channels of an activation times the gradient of the class's logit there (Draelos & Carin
    2020, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
    arXiv:2011.08891). The activation is the last one that all of the network goes through and that still has at least a
    quarter of the image's side: deeper ones are too coarse to point at a scratch. A wafer turned is the same wafer, so
    the mean over its eight views is as good an explanation and a finer one.

    Args:
        predictor: of the exported file.

    Raises:
        ModelError: its network has no such activation, or is one that there is no gradient for.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        try:
            model = with_relevance(predictor.graph(), int(predictor.about.get("image_size", 0)))
            answered = json.loads(predictor.about.get("answered", "null"))
            self._outputs = answered or list(range(len(predictor.class_names)))
            self._wanted = np.eye(model.graph.input[-1].type.tensor_type.shape.dim[1].dim_value, dtype=np.float32)
            if len(self._outputs) != len(predictor.class_names) or max(self._outputs) >= len(self._wanted):
                raise ValueError("it says that other outputs are its answer than it has")
            self._session = predictor.open(model.SerializeToString())
        except (NoGradientError, ValueError, TypeError, IndexError) as error:
            raise ModelError(
                f"{predictor.name} cannot be explained: {error}. Leave out --explain, or use a convolutional network "
                "that was exported by this version."
            ) from error

    def relevance(self, one_map: np.ndarray, class_index: int) -> np.ndarray:
        """How much each die speaks for a class, or against it.

        Args:
            one_map: uint8 [rows, columns], 0 no die / 1 pass / 2 fail.
            class_index: the class's column in the predictor's answers.

        Returns:
            float32 [rows, columns] in parts of the class's logit, above 0 for it; 0 where there is no die.

        Raises:
            ValueError: not such a map.
        """
        from PIL import Image

        check_map(one_map, "the map")
        views = _views(one_map)
        found = self._of(next(views), class_index)  # of all eight views, if the file makes them itself
        if len(found) == 1:
            found = np.concatenate([found, *(self._of(view, class_index) for view in views)])
        relevance = np.mean([_turned_back(one, number) for number, one in enumerate(found)], axis=0)
        rows, columns = one_map.shape
        image = Image.fromarray(relevance).resize((columns, rows), Image.Resampling.BILINEAR)
        return np.asarray(image) * (one_map > 0)

    def _of(self, one_map: np.ndarray, class_index: int) -> np.ndarray:
        """Relevance float32 [views, h, w] as the network sees the map."""
        wanted = self._wanted[self._outputs[class_index]][None]
        return self._session.run(["relevance"], {"maps": np.ascontiguousarray(one_map)[None], "wanted": wanted})[0]


def explain_maps(
    predictor: Predictor, maps: Sequence[np.ndarray], *, folder: Path, names: Sequence[str] | None = None
) -> list[Path]:
    """Draws what the predictor looked at, for the likeliest class of each map; several maps to a page (PNG).

    Args:
        predictor: of the exported file.
        maps: each uint8 [rows, columns].
        folder: where the pages go.
        names: what the maps are called, one each; None for their place.

    Returns:
        The pages: relevance_1.png, relevance_2.png and so on; those with a higher number, of an earlier call with more
        maps, are removed.

    Raises:
        ModelError: the network cannot be explained.
        ValueError: a map is none; see `Predictor.predict`.
    """
    from waferlab.reports.explain_figures import plot_relevance

    explainer, probabilities = Explainer(predictor), predictor.probabilities(maps)
    names = names or [f"map {number}" for number in range(len(maps))]
    pages = []
    for start in range(0, len(maps), MAPS_A_PAGE):
        some, chances = maps[start : start + MAPS_A_PAGE], probabilities[start : start + MAPS_A_PAGE]
        path = folder / f"relevance_{len(pages) + 1}.png"
        relevance = [explainer.relevance(one, int(row.argmax())) for one, row in zip(some, chances, strict=True)]
        captions = [
            (predictor.class_names[row.argmax()], name, float(row.max()))
            for name, row in zip(names[start:], chances, strict=False)
        ]
        pages.append(plot_relevance(some, relevance, captions, path=path, title=f"What {predictor.name} looked at"))
    for earlier in {*folder.glob("relevance_*.png")} - {*pages}:  # of more maps
        if re.fullmatch(r"relevance_\d+\.png", earlier.name):
            earlier.unlink()
    return pages


def _views(one_map: np.ndarray) -> Iterator[np.ndarray]:
    """The eight views of a map in the order of `waferlab.data.images.symmetries`."""
    for turned in (np.rot90(one_map, quarter) for quarter in range(4)):
        yield turned
        yield turned[:, ::-1]


def _turned_back(view: np.ndarray, number: int) -> np.ndarray:
    quarter, mirrored = divmod(number, 2)
    return np.rot90(view[:, ::-1] if mirrored else view, -quarter)


def with_relevance(model: onnx.ModelProto, image_size: int) -> onnx.ModelProto:
    """A classifier's graph, turned into one from maps and a class, `wanted` float [1, outputs], to `relevance`.

    Raises:
        NoGradientError: see `Explainer`.
    """
    graph = model.graph
    features = next((one.value for one in model.metadata_props if one.key == "features"), "")
    linear = [node for node in graph.node if node.op_type == "Gemm"]
    # The network may be in the graph twice, for one view and for seven more; its features are those of the first.
    linear = [node for node in linear if node.input[0] == features] or linear[-1:]
    if not linear:
        raise NoGradientError("it ends in no linear layer")
    logits = linear[0].output[0]
    backward = Backward(model)
    at = _explained_layer(backward, logits, smallest=image_size / 4)
    seed = backward.add("Expand", "wanted", backward.add("Shape", logits))
    parts = backward.add("Mul", at, backward.gradient(logits, at, seed))
    channels = backward.constant([1], np.int64)
    graph.node.append(helper.make_node("ReduceSum", [parts, channels], ["relevance"], keepdims=0))
    size = ["views", *backward.shapes[at][2:]]
    graph.input.append(helper.make_tensor_value_info("wanted", onnx.TensorProto.FLOAT, [1, backward.shapes[logits][1]]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("relevance", onnx.TensorProto.FLOAT, size))
    return model


def _explained_layer(backward: Backward, logits: str, *, smallest: float) -> str:
    """The last activation [N, C, h, w] of so many pixels a side that all ways from map to logits go through."""
    nodes = backward.model.graph.node
    (images,) = (one.name for one in backward.model.graph.input)
    for node in reversed(nodes):
        for name in node.output:
            shape = backward.shapes.get(name, ())
            large = len(shape) == 4 and None not in shape[1:] and min(shape[2:]) >= smallest
            if large and node.op_type != "Cast" and shape[1] > 1 and not _reaches(nodes, images, logits, without=name):
                return name
    raise NoGradientError(f"no activation of at least {smallest:g} pixels a side is one that all of it goes through")


def _reaches(nodes: Sequence[onnx.NodeProto], start: str, end: str, *, without: str) -> bool:
    """Whether a tensor's numbers depend on another's by any way around a third; of a shape they do not."""
    reached = {start}
    for node in nodes:
        if node.op_type != "Shape" and reached.intersection(node.input):
            reached.update(name for name in node.output if name != without)
    return end in reached

"""From a trained model to a file that stands alone: ONNX with the preprocessing inside; exported, checked, run.

What goes in are raw die maps as they come (uint8 [N, rows, columns], 0 no die, 1 pass, 2 fail, any size); what comes
out are class probabilities (float32 [N, classes]). An ONNX file holds a graph and tensors, no code: unlike a pickle, it
is safe to load from others. ONNX Runtime reads no tensors from outside of the file's folder, and no operators but its
own are given to it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from waferlab.data.images import encode, resize_dies, symmetries
from waferlab.data.maps import CLASS_NAMES
from waferlab.evaluation.decision import Decision
from waferlab.tracking.whole_files import write_atomically

CONTRACT = "maps uint8 [N, rows, columns] (0 no die, 1 pass, 2 fail) -> probabilities float32 [N, classes]"


class RawMapClassifier(nn.Module):
    """A model with all that surrounds it: maps resized as in training and encoded; the decision made of its outputs."""

    def __init__(self, model: nn.Module, image_size: int, decision: Decision | None = None) -> None:
        super().__init__()
        self.model, self.image_size, self.decision = model, image_size, decision or Decision()

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [N, rows, columns] to probabilities float32 [N, classes], without those that are left out.

        And the features, float32 [N, F]: what the network's last linear layer is given of the map as it is.
        """
        images = encode(resize_dies(maps, self.image_size))
        logits, features = self._with_features(images)
        outputs = logits.softmax(-1)
        if self.decision.views == 8:
            outputs = self._with_eight_views(images, outputs)
        probabilities = self.decision.apply(outputs)
        return probabilities[:, self.decision.answered(probabilities.shape[-1])], features

    def _with_eight_views(self, images: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        """The network's probabilities of the first view where that is sure, else of eight; see `Decision.blend`."""
        if self.decision.sure_at is None:
            return self._mean_of_eight(images, one)
        unsure = (one.amax(-1) < self.decision.sure_at).nonzero().squeeze(1)
        if torch.compiler.is_exporting():  # it cannot know that a network also takes no image at all
            torch._check(unsure.shape[0] > 0)
        some, said = images[unsure], one[unsure]
        return one.index_copy(0, unsure, self.decision.blend(said, self._mean_of_eight(some, said)))

    def _mean_of_eight(self, images: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        _, *turned = symmetries(images)
        return (one + self.model(torch.cat(turned)).softmax(-1).unflatten(0, (7, -1)).sum(0)) / 8

    def _with_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and what the last linear layer makes them of; of a network without one, the logits again."""
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        given: list[torch.Tensor] = []
        hooks = [one.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])) for one in linear[-1:]]
        logits = self.model(images)
        for hook in hooks:
            hook.remove()
        return logits, (given or [logits])[-1].flatten(1)


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    image_size: int,
    decision: Decision | None = None,
    class_names: Sequence[str] = CLASS_NAMES,
    **metadata: str,
) -> Path:
    """Writes a model with its preprocessing as one ONNX file for any number of maps of any size.

    The same model gives the same bytes. The exporter's notes on each node are left out: they name lines of source code
    and the folders of this machine.

    Args:
        model: float [N, 1, S, S] in -1..1 to logits [N, classes]; on the CPU, in evaluation mode.
        path: the file to write, whole or not at all.
        image_size: the S that it was trained with.
        decision: how the answer is made of its outputs.
        class_names: of all outputs of the model; the file keeps the names of those that it answers with.
        **metadata: more that the file shall say of itself.

    Raises:
        ValueError: the exporter cannot follow the model.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    decision = decision or Decision()
    program = _traced(RawMapClassifier(model, image_size, decision).eval())
    answered = decision.answered(len(class_names))
    about = {"class_names": json.dumps([class_names[label] for label in answered]), "answered": json.dumps(answered)}
    about |= {"contract": CONTRACT, "image_size": str(image_size)}
    # The features stay in the graph, by name: whoever asks for them has them computed out of it, and nobody else.
    about["features"] = program.model.graph.outputs.pop().name
    ClearMetadataAndDocStringPass()(program.model)
    _without_idle_ceil(program.model.graph)
    program.model.metadata_props.update(about | metadata)
    return write_atomically(path, program.model_proto.SerializeToString())


def _without_idle_ceil(graph: Any) -> None:
    """Pools that would round a size up, where it is even anyway, do not say so: ONNX Runtime then has a faster way."""
    for node in graph:
        size = node.inputs[0].shape if node.op_type == "AveragePool" else None
        strides = node.attributes.get_ints("strides", ()) if size is not None else ()
        if strides and all(isinstance(n, int) and n % by == 0 for n, by in zip(size.dims[2:], strides, strict=True)):
            node.attributes.pop("ceil_mode", None)


def _traced(whole: RawMapClassifier) -> torch.onnx.ONNXProgram:
    from torch.export import Dim

    example = torch.ones(2, 25, 27, dtype=torch.uint8)
    sizes = {0: Dim("maps"), 1: Dim("rows", min=2, max=4096), 2: Dim("columns", min=2, max=4096)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter warns of its own future, and when it fails it writes the whole graph to the terminal.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return torch.onnx.export(
                whole, (example,), dynamo=True, dynamic_shapes=(sizes,), opset_version=18, verbose=False,
                input_names=["maps"], output_names=["probabilities", "features"],
            )  # fmt: skip
        except Exception as error:  # the exporter's own kind says how to debug it; what was wrong is its cause
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:200]}"
            raise ValueError(
                f"{type(whole.model).__name__} cannot be exported ({reason}). Keep its forward to operations on "
                "tensors, without branches on their values."
            ) from error

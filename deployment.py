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

import numpy as np
import torch
from torch import nn

from decision import Decision
from wafer_data import CLASS_NAMES, encode, resize_dies, symmetries

CONTRACT = "maps uint8 [N, rows, columns] (0 no die, 1 pass, 2 fail) -> probabilities float32 [N, classes]"


class RawMapClassifier(nn.Module):
    """A model with all that surrounds it: maps resized as in training and encoded; the decision made of its outputs."""

    def __init__(self, model: nn.Module, image_size: int, decision: Decision | None = None) -> None:
        super().__init__()
        self.model, self.image_size, self.decision = model, image_size, decision or Decision()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """uint8 [N, rows, columns] to probabilities float32 [N, classes], without those that are left out."""
        images = encode(resize_dies(maps, self.image_size))
        views = list(symmetries(images)) if self.decision.views == 8 else [images]
        outputs = self.model(torch.cat(views)).softmax(-1)
        probabilities = self.decision.apply(outputs.unflatten(0, (len(views), -1)).mean(0))
        return probabilities[:, self.decision.answered(probabilities.shape[-1])]


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
        path: the file to write.
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
    answered = [class_names[label] for label in decision.answered(len(class_names))]
    about = {"class_names": json.dumps(answered), "contract": CONTRACT, "image_size": str(image_size)}
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(about | metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
    return path


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
                input_names=["maps"], output_names=["probabilities"],
            )  # fmt: skip
        except Exception as error:  # the exporter's own kind says how to debug it; what was wrong is its cause
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:200]}"
            raise ValueError(
                f"{type(whole.model).__name__} cannot be exported ({reason}). Keep its forward to operations on "
                "tensors, without branches on their values."
            ) from error


class OnnxClassifier:
    """Runs an exported file with ONNX Runtime on the CPU.

    Attributes:
        class_names: what the columns of the probabilities mean.

    Raises:
        ValueError: the file is no exported classifier, or its answer has other columns than it has class names.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            about = self._session.get_modelmeta().custom_metadata_map
            self.class_names = tuple(json.loads(about["class_names"]))
        except Exception as error:  # ONNX Runtime has many kinds; each means that this file cannot be used
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(f"{path} is no exported classifier ({reason}). Export the model anew.") from error
        shape = self._session.get_outputs()[0].shape
        if len(shape) != 2 or shape[1] != len(self.class_names):
            raise ValueError(
                f"{path} answers {shape} for the {len(self.class_names)} classes that it names. Wanted: "
                f"[maps, {len(self.class_names)}]. Export the model anew."
            )

    def predict(self, maps: Sequence[np.ndarray], *, batch_size: int = 256) -> np.ndarray:
        """Probabilities float32 [N, classes] of raw die maps, each uint8 [rows, columns]; sizes may differ.

        Raises:
            ValueError: a map is empty, not uint8, not two-dimensional, or has values other than 0, 1 and 2.
        """
        for i, one in enumerate(maps):
            if 0 in one.shape:
                raise ValueError(f"map {i} is {one.shape}, without a die. Wanted: at least one row and one column.")
            if one.ndim != 2 or one.dtype != np.uint8 or one.max(initial=0) > 2:
                raise ValueError(
                    f"map {i} is {one.dtype} {one.shape} with values up to {one.max(initial=0)}. Wanted: uint8 "
                    "[rows, columns] with 0 no die, 1 pass, 2 fail."
                )
        out = np.empty((len(maps), len(self.class_names)), dtype=np.float32)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, one in enumerate(maps):
            by_size.setdefault(one.shape, []).append(i)
        for members in by_size.values():
            for start in range(0, len(members), batch_size):
                some = members[start : start + batch_size]
                out[some] = self._session.run(None, {"maps": np.stack([maps[i] for i in some])})[0]
        return out

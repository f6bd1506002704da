"""From a trained model to a file that stands alone: ONNX with the preprocessing inside; exported, checked, run.

What goes in are raw die maps as they come (uint8 [N, rows, columns], 0 no die, 1 pass, 2 fail, any size); what comes
out are class probabilities (float32 [N, classes]). An ONNX file holds a graph and tensors, no code: unlike a pickle, it
is safe to load from others.
"""

from __future__ import annotations

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
        """uint8 [N, rows, columns] to probabilities float32 [N, classes]."""
        images = encode(resize_dies(maps, self.image_size))
        views = list(symmetries(images)) if self.decision.views == 8 else [images]
        outputs = self.model(torch.cat(views)).softmax(-1)
        return self.decision.apply(outputs.unflatten(0, (len(views), -1)).mean(0))


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

    Args:
        model: float [N, 1, S, S] in -1..1 to logits [N, classes]; on the CPU, in evaluation mode.
        path: the file to write.
        image_size: the S that it was trained with.
        decision: how the answer is made of its outputs.
        class_names: what the columns of the output mean; kept in the file.
        **metadata: more that the file shall say of itself.
    """
    from torch.export import Dim

    whole = RawMapClassifier(model, image_size, decision).eval()
    example = torch.ones(2, 25, 27, dtype=torch.uint8)
    sizes = {0: Dim("maps"), 1: Dim("rows", min=2, max=4096), 2: Dim("columns", min=2, max=4096)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own future
        program = torch.onnx.export(
            whole, (example,), dynamo=True, dynamic_shapes=(sizes,), opset_version=18, verbose=False,
            input_names=["maps"], output_names=["probabilities"],
        )  # fmt: skip
    about = {"class_names": json.dumps(list(class_names)), "contract": CONTRACT, "image_size": str(image_size)}
    program.model.metadata_props.update(about | metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
    return path


class OnnxClassifier:
    """Runs an exported file with ONNX Runtime on the CPU.

    Attributes:
        class_names: what the columns of the probabilities mean.

    Raises:
        ValueError: the file is no exported classifier.
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

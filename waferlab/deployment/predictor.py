"""Answers of an exported file: ONNX Runtime on raw die maps, without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


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

"""What a model answers, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import islice
from typing import Any

import numpy as np
import torch

from waferlab.data.images import encode, symmetries
from waferlab.evaluation.decision import VIEWS, Decision
from waferlab.models.classifier import WaferClassifier


def predict_probabilities(
    model: WaferClassifier, images: torch.Tensor, decision: Decision | None = None, *, batch_size: int = 256
) -> np.ndarray:
    """Class probabilities float32 [N, 9] for resized maps, uint8 [N, 1, S, S], computed in full precision."""
    decision = decision or Decision()
    by_views = probabilities_by_views(model, images, (decision.views,), batch_size=batch_size)
    return decision.of_views(by_views)


@torch.inference_mode()
def probabilities_by_views(
    model: WaferClassifier, images: torch.Tensor, views: Sequence[int] = VIEWS, *, batch_size: int = 256
) -> dict[int, np.ndarray]:
    """For each number of views (1, 8) the mean of the network's own probabilities over them, float32 [N, 9].

    The map as it is comes first among its eight views, so 1 costs nothing beside 8.
    """
    model.eval()
    parts: dict[int, list[torch.Tensor]] = {count: [] for count in views}
    for batch in images.split(batch_size):
        turned = islice(symmetries(batch.to(model.device)), max(views))
        probabilities = torch.stack([model(encode(view)).softmax(-1) for view in turned])
        for count in views:
            parts[count].append(probabilities[:count].mean(0).cpu())
    return {count: torch.cat(batches).numpy() for count, batches in parts.items()}


def decision_record(decision: Decision, plain: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """The decision, and what the plain answers of the same weights would have scored."""
    return asdict(decision) | {
        "validation_macro_f1_before": plain["validation"]["macro_f1"],
        "validation_macro_f1_after": scores["validation"]["macro_f1"],
        "test_macro_f1_before": plain["test"]["macro_f1"],
        "calibration_error_before": plain["test"]["expected_calibration_error"],
        "calibration_error_after": scores["test"]["expected_calibration_error"],
    }


@torch.inference_mode()
def measure_latency(model: WaferClassifier, image_size: int, *, views: int = 1, repeats: int = 30) -> float:
    """Median milliseconds to classify one map on the CPU in full precision, after five runs to warm up."""
    image = torch.zeros(views, 1, image_size, image_size)
    times = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[5:]))


def decision_of(result: dict[str, Any]) -> Decision:
    """The decision that `evaluate` chose for a model."""
    chosen = {"left_out": result["left_out"]} | result.get("decision", {})
    return Decision(**{f.name: chosen[f.name] for f in fields(Decision) if f.name in chosen})

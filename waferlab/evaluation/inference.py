"""What a model answers, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from itertools import islice
from typing import Any

import numpy as np
import torch

from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.images import encode, symmetries
from waferlab.data.maps import CLASS_NAMES, NUM_CLASSES, WaferMaps
from waferlab.data.splitting import Split
from waferlab.errors import DamagedFileError
from waferlab.evaluation.conformal import PredictionSets, evaluate_sets
from waferlab.evaluation.decision import VIEWS, Decision, choose_decision
from waferlab.evaluation.metrics import compute_metrics, scores_by_grid
from waferlab.evaluation.predictions import Predictions
from waferlab.models.classifier import WaferClassifier, macro_f1
from waferlab.records import ModelResult, TrainingRecord

BATCH_SIZE = 256


def predict_probabilities(
    model: WaferClassifier, images: torch.Tensor, decision: Decision | None = None, *, batch_size: int = BATCH_SIZE
) -> np.ndarray:
    """Class probabilities float32 [N, 9] for resized maps, uint8 [N, 1, S, S], computed in full precision."""
    decision = decision or Decision()
    by_views = probabilities_by_views(model, images.split(batch_size), decision.needs)
    return decision.of_views(by_views)


@torch.inference_mode()
def probabilities_by_views(
    model: WaferClassifier, batches: Iterable[torch.Tensor], views: Sequence[int] = VIEWS
) -> dict[int, np.ndarray]:
    """For each number of views (1, 8) the mean of the network's own probabilities over them, float32 [N, 9].

    Batches are of resized maps, uint8 [B, 1, S, S].
    The map as it is comes first among its eight views, so 1 costs nothing beside 8.
    """
    model.eval()
    parts: dict[int, list[torch.Tensor]] = {count: [] for count in views}
    for batch in batches:
        turned = islice(symmetries(batch.to(model.device)), max(views))
        probabilities = torch.stack([model(encode(view)).softmax(-1) for view in turned])
        for count in views:
            parts[count].append(probabilities[:count].mean(0).cpu())
    return {count: torch.cat(batches).numpy() for count, batches in parts.items()}


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


def score_model(
    model: WaferClassifier,
    record: TrainingRecord,
    *,
    data: WaferMapDataModule,
    maps: WaferMaps,
    split: Split,
    tune_decision: bool = False,
    watch: Callable[[Sequence[Any], str], Iterable[Any]] = lambda batches, title: batches,
) -> tuple[ModelResult, Predictions]:
    """Scores a trained model on validation, where its decision is chosen, and then on test.

    Args:
        model: with the weights that the record describes.
        record: of its training.
        data: the images of the parts.
        maps: with labels and lots.
        split: the parts.
        tune_decision: choose views, prior correction and temperature on validation; else the answers are plain.
        watch: shows the progress over batches.

    Returns:
        The record with scores and latency added, and what was answered on test.

    Raises:
        DamagedFileError: on validation, the weights do not score as in the best epoch of their training.
    """
    counts = np.bincount(maps.labels[split.train], minlength=NUM_CLASSES)
    untuned = Decision(left_out=tuple(np.flatnonzero(counts == 0).tolist()))

    def answers(part: str) -> dict[int, np.ndarray]:
        batches = watch(data.images(part).split(BATCH_SIZE), f"{record.model_type}, {part}")
        return probabilities_by_views(model, batches, VIEWS if tune_decision else (1,))

    def predictions(part: str, probabilities: np.ndarray) -> Predictions:
        return _of_trained_classes(probabilities, maps, split.parts()[part], trained=counts > 0)

    by_views = {"validation": answers("validation")}
    _check_is_what_was_trained(record, predictions("validation", untuned.of_views(by_views["validation"])))
    decision = untuned
    if tune_decision:
        decision = choose_decision(by_views["validation"], maps.labels[split.validation], counts)
    by_views["test"] = answers("test")
    predicted = {part: predictions(part, decision.of_views(views)) for part, views in by_views.items()}
    scores = {part: compute_metrics(one) for part, one in predicted.items()}
    scores["test"]["by_grid"] = scores_by_grid(predicted["test"], np.asarray(maps.shapes)[split.test])
    rule = None
    if tune_decision:
        before = {part: compute_metrics(predictions(part, untuned.of_views(v))) for part, v in by_views.items()}
        rule = _decision_record(decision, before, scores)
    latency = measure_latency(model, data.image_size, views=decision.views)
    sets = PredictionSets.fit(predicted["validation"])
    held = evaluate_sets(sets, predicted["test"]) | {"floors": sets.as_text()}
    more = {"latency_ms": latency, "left_out": decision.left_out, "decision": rule, "sets": held}
    return ModelResult(**vars(record), **scores, **more), predicted["test"]


def decision_of(result: ModelResult) -> Decision:
    """The decision that `score_model` chose for a model."""
    names = {field.name for field in fields(Decision)}
    chosen = {name: value for name, value in (result.decision or {}).items() if name in names}
    return Decision(**{"left_out": result.left_out, **chosen})


def _decision_record(decision: Decision, plain: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """The decision, and what the plain answers of the same weights would have scored."""
    return asdict(decision) | {
        "validation_macro_f1_before": plain["validation"]["macro_f1"],
        "validation_macro_f1_after": scores["validation"]["macro_f1"],
        "test_macro_f1_before": plain["test"]["macro_f1"],
        "calibration_error_before": plain["test"]["expected_calibration_error"],
        "calibration_error_after": scores["test"]["expected_calibration_error"],
    }


def _of_trained_classes(
    probabilities: np.ndarray, maps: WaferMaps, indices: np.ndarray, *, trained: np.ndarray
) -> Predictions:
    """Answers on maps with the truth and the lots beside them, of the classes that training had maps of.

    Of the other classes nothing can be known.
    """
    among_trained = np.cumsum(trained) - 1
    return Predictions(
        probabilities=probabilities[:, trained],
        labels=among_trained[maps.labels[indices]],
        groups=maps.groups[indices],
        class_names=tuple(np.array(CLASS_NAMES)[trained]),
    )


def _check_is_what_was_trained(record: TrainingRecord, on_validation: Predictions) -> None:
    score, expected = float(macro_f1(torch.from_numpy(on_validation.confusion()))), record.val_macro_f1
    # In bfloat16, in which training may have computed it, answers on the edge fall to the other side: of a network
    # that has learnt little yet, quite some. Its check sum has shown that the file is what was written.
    if abs(score - expected) > (0.02 if record.precision == "32-true" else 0.15):
        raise DamagedFileError(
            f"{record.model_type}: the checkpoint scores {score:.3f} on validation, the best epoch of its "
            f"training {expected:.3f}. It is not what was trained. Leave out --resume to train anew."
        )

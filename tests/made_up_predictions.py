"""Made-up predictions, and what a picture must at least be."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from waferlab.evaluation.predictions import Predictions

CLASSES = ("Center", "Donut", "Edge-Loc", "Edge-Ring", "Loc", "Near-full", "Random", "Scratch", "none")


def make_predictions(
    *, n: int = 400, n_classes: int = 9, n_lots: int = 20, seed: int = 0, sharpness: float = 2.0, labels=None
) -> Predictions:
    """Predictions that are right about two times in three, in lots of random size."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n) if labels is None else np.asarray(labels)
    logits = rng.normal(size=(len(labels), n_classes)) + sharpness * np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(probabilities, labels, rng.integers(n_lots, size=len(labels)), CLASSES[:n_classes])


def from_hits(hits: np.ndarray, confidence: np.ndarray | float, groups: np.ndarray | None = None) -> Predictions:
    """Two classes, all maps of the first one; hits bool [N] says where the model is right."""
    hits = np.asarray(hits)
    confidence = np.broadcast_to(np.asarray(confidence, dtype=np.float64), hits.shape)
    first = np.where(hits, confidence, 1 - confidence)
    groups = np.arange(len(hits)) if groups is None else groups
    return Predictions(np.stack([first, 1 - first], axis=1), np.zeros(len(hits), dtype=int), groups, ("good", "bad"))


def read_pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def assert_is_a_picture(path: Path, *, at_least: tuple[int, int] = (250, 800)) -> None:
    pixels = read_pixels(path)
    assert pixels.shape[0] >= at_least[0]
    assert pixels.shape[1] >= at_least[1]
    dark_or_coloured = (pixels.min(axis=2) < 0.8).mean()
    assert 0.005 < dark_or_coloured < 0.9, "almost uniform: nothing was drawn"
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    assert border.min() > 0.99, "something touches the border: it is probably clipped"


LONG_NAME = "my_company_vision_transformer_small_patch4_distilled_v2"

RESULTS = [
    {
        "model_type": name,
        "accuracy": macro_f1 + 0.03,
        "macro_f1": macro_f1,
        "macro_f1_interval": [macro_f1 - 0.02, macro_f1 + 0.015],
        "train_seconds": 41.3,
        "n_parameters": 2_400_000,
        "latency_ms": 1.25,
    }
    for name, macro_f1 in [
        ("lightning_cnn", 0.742),
        ("torchvision_resnet", 0.836),
        ("torchvision_efficientnet", 0.851),
        ("yolo_inspired", 0.801),
    ]
]

"""Settings that a search tries after the defaults, by model: they did best, or nearly, on other maps.

They come from `benchmarks/portfolio.py`, which trains many on generated maps and on half of the lots of real ones, and
picks the few that together do best. Each has all that is searched; what an architecture does not ask for with the start
that a training has is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _setting(learning_rate: float, batch_size: int, dropout: float, weight_decay: float, **own: Any) -> dict[str, Any]:
    shared = {"learning_rate": learning_rate, "batch_size": batch_size, "dropout": dropout}
    return shared | {"weight_decay": weight_decay} | own


_cnn = {"base_channels": 16, "optimizer": "muon"}
_whole = {"freeze_backbone": False}
_nano = {"model_size": "n"}
PORTFOLIOS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "lightning_cnn": (
        _setting(4e-3, 16, 0.27, 0.05, **_cnn),
        _setting(4e-3, 32, 0.1, 1.2e-4, **_cnn),
        _setting(4.9e-3, 32, 0.37, 0.05, **_cnn),
    ),
    "torchvision_resnet": (
        _setting(1.9e-3, 64, 0.2, 1.2e-5, **_whole),
        _setting(1e-3, 32, 0.11, 0.05, **_whole),
        _setting(1e-3, 32, 0.55, 4.7e-4, **_whole),
    ),
    "torchvision_efficientnet": (
        _setting(3e-3, 32, 0.11, 0.05, **_whole),
        _setting(3e-3, 64, 0.47, 0.05, **_whole),
        _setting(3e-3, 32, 0.2, 1.2e-4, **_whole),
    ),
    "yolo_inspired": (
        _setting(2e-3, 64, 0.47, 0.05, **_nano),
        _setting(2e-3, 32, 0.2, 1.2e-4, **_nano),
        _setting(2.4e-3, 32, 0.37, 0.05, **_nano),
    ),
}

"""The classification network of YOLO11 from ultralytics (AGPL-3.0), imported only when such a model is built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from waferlab.data.maps import NUM_CLASSES
from waferlab.errors import WeightsUnavailableError
from waferlab.models.classifier import WaferClassifier
from waferlab.models.starting_weights import fetch_weights, read_weights, sum_first_layer


class YOLOLightningAdapter(WaferClassifier):
    """The classification network of YOLO11 (CSP blocks, SiLU) from ultralytics, for one channel and nine classes.

    ultralytics is AGPL-3.0 and is imported only when this model is built.

    Args:
        model_size: "n", "s" or "m".
        dropout: before the last layer, 0..1.
        **training: see `WaferClassifier`.

    Raises:
        ValueError: an unknown size.
    """

    SIZES = ("n", "s", "m")
    WEIGHTS_URL = "https://github.com/ultralytics/assets/releases/download/v8.3.0/{name}"

    def __init__(
        self,
        *,
        model_size: str = "n",
        dropout: float = 0.2,
        num_classes: int = NUM_CLASSES,
        **training,
    ) -> None:
        super().__init__(num_classes=num_classes, **training)
        if model_size not in self.SIZES:
            raise ValueError(f"model_size={model_size!r} is unknown. Allowed: {', '.join(self.SIZES)}.")
        self.save_hyperparameters()
        self.model_size = model_size
        self.network = import_ultralytics_tasks().ClassificationModel(
            f"yolo11{model_size}-cls.yaml", ch=1, nc=num_classes, verbose=False
        )
        self.network.model[-1].drop.p = dropout

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float [B, 1, S, S] to logits [B, 9]; outside training the network returns (probabilities, logits)."""
        output = super().forward(images)
        return output[1] if isinstance(output, tuple) else output

    def load_published(self, wait: float) -> str:
        """ImageNet weights into all but the last layer; the first layer's kernels summed over RGB."""
        name = f"yolo11{self.model_size}-cls.pt"
        cache = Path(torch.hub.get_dir()) / "checkpoints" / name
        file = fetch_weights(self.WEIGHTS_URL.format(name=name), cache, wait=wait)
        self.adopt(read_weights(file, allowed=ultralytics_classes()))
        return f"ultralytics {name}"

    def adopt(self, checkpoint: dict[str, Any]) -> None:
        """Copies an ultralytics checkpoint {"model": ClassificationModel} (RGB, 1000 classes) into the network."""
        state = (checkpoint.get("ema") or checkpoint["model"]).float().state_dict()
        ours = self.network.state_dict()
        first = "model.0.conv.weight"
        state[first] = sum_first_layer(state[first])
        head = f"model.{len(self.network.model) - 1}.linear."
        state = {name: value for name, value in state.items() if not name.startswith(head)}
        wrong = [n for n, v in state.items() if n not in ours or ours[n].shape != v.shape]
        if wrong or any(n not in state and not n.startswith(head) for n in ours):
            raise WeightsUnavailableError(f"the weights do not fit, for example {wrong[:1]}")
        self.network.load_state_dict(state, strict=False)


def import_ultralytics_tasks():
    """Imports ultralytics quietly: no network, no installing, and torch keeps its threads."""
    threads, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    for name, value in (("YOLO_OFFLINE", "1"), ("YOLO_AUTOINSTALL", "false"), ("YOLO_VERBOSE", "false")):
        os.environ.setdefault(name, value)
    import ultralytics.nn.tasks as tasks

    torch.set_num_threads(threads)
    if told is None:  # ultralytics says 1, and the programs that this one starts would obey
        os.environ.pop("OMP_NUM_THREADS", None)
    return tasks


def ultralytics_classes() -> list[type]:
    """The classes that a classification checkpoint of ultralytics consists of, and nothing else."""
    tasks = import_ultralytics_tasks()
    from ultralytics.nn.modules import block, conv, head

    names = {
        block: ("C2PSA", "PSABlock", "Attention", "C3k2", "C3k", "C2f", "C3", "Bottleneck"),
        conv: ("Conv",),
        head: ("Classify",),
    }
    torch_classes = [
        nn.Sequential, nn.ModuleList, nn.Conv2d, nn.BatchNorm2d, nn.SiLU, nn.Identity, nn.AdaptiveAvgPool2d,
        nn.Dropout, nn.Linear,
    ]  # fmt: skip
    return [tasks.ClassificationModel, *torch_classes, *(getattr(m, n) for m, ns in names.items() for n in ns)]

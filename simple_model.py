"""The LightningModule that every model shares, and the small residual CNN built on it.

`WaferClassifier` holds what does not depend on the architecture: loss, metrics, optimiser, schedule. A model is a
subclass whose constructor sets `self.network`, any `nn.Module` from [B, 1, S, S] to logits [B, 9]. Each works in a
plain `Trainer.fit(model, datamodule)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from waferlab.models.classifier import WaferClassifier


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385).

    A block that halves the image averages 2x2 dies on its shortcut (He et al. 2019, arXiv:1812.01187), so that no
    die is skipped.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        nn.init.zeros_(self.body[-1].weight)  # each block starts as its shortcut: deeper nets learn from the first step
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True) if stride != 1 else nn.Identity(),
                nn.Conv2d(channels_in, channels_out, 1, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class AverageAndMaxPool(nn.Module):
    """[B, C, H, W] to [B, 2C]: how much of a feature there is, and how strong it is at its strongest.

    The maximum keeps what a scratch of a few dies says from being averaged away.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pools over the image."""
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


class LightningCNN(WaferClassifier):
    """A residual CNN for small images: four blocks, the first at full resolution, each next one at half of it.

    One block a stage: on real wafer maps, twice the blocks or half again the width lost at equal training time.

    Args:
        base_channels: width of the first block; the others are twice, four and eight times as wide.
        dropout: before the last layer, 0..1.
        **training: see `WaferClassifier`.
    """

    def __init__(self, *, base_channels: int = 16, dropout: float = 0.1, num_classes: int = 9, **training) -> None:
        super().__init__(num_classes=num_classes, **training)
        self.save_hyperparameters()
        widths = [base_channels * 2**stage for stage in range(4)]
        blocks = [
            ResidualBlock(before, width, stride=1 if stage == 0 else 2)
            for stage, (before, width) in enumerate(zip([base_channels, *widths], widths, strict=False))
        ]
        self.network = nn.Sequential(
            nn.Conv2d(1, base_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(base_channels),
            nn.ReLU(inplace=True),
            *blocks,
            AverageAndMaxPool(),
            nn.Dropout(dropout),
            nn.Linear(2 * widths[-1], num_classes),
        )

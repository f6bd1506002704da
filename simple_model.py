"""The LightningModule that every model shares, and the small residual CNN built on it.

`WaferClassifier` holds what does not depend on the architecture: loss, metrics, optimiser, schedule. A model is a
subclass whose constructor sets `self.network`, any `nn.Module` from [B, 1, S, S] to logits [B, 9]. Each works in a
plain `Trainer.fit(model, datamodule)`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from waferlab.models.classifier import WaferClassifier


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385), to half the resolution.

    The shortcut averages 2x2 dies (He et al. 2019, arXiv:1812.01187), so that none is skipped.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        nn.init.zeros_(self.body[-1].weight)  # each block starts as its shortcut: deeper nets learn from the first step
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels_in, H, W] to [B, channels_out, ceil(H / 2), ceil(W / 2)]."""
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class AverageAndMaxPool(nn.Module):
    """[B, C, H, W] to [B, 2C]: how much of a feature there is, and how strong it is at its strongest.

    The maximum keeps what a scratch of a few dies says from being averaged away.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pools over the image."""
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


class LightningCNN(WaferClassifier):
    """A residual CNN for small images: a first layer at full resolution, then three blocks, each to half of it.

    A block at full resolution would cost a quarter of the time: on real wafer maps two minutes of training reached more
    without one (two seeds), and five about the same (one seed). Twice the blocks or half again the width lost at equal
    training time.

    Args:
        base_channels: width of the first layer; the blocks are twice, four and eight times as wide.
        dropout: before the last layer, 0..1.
        **training: see `WaferClassifier`.
    """

    def __init__(self, *, base_channels: int = 16, dropout: float = 0.1, num_classes: int = 9, **training) -> None:
        super().__init__(num_classes=num_classes, **training)
        self.save_hyperparameters()
        widths = [base_channels * 2**stage for stage in range(4)]
        blocks = [ResidualBlock(before, width) for before, width in pairwise(widths)]
        self.network = nn.Sequential(
            nn.Conv2d(1, base_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(base_channels),
            nn.ReLU(inplace=True),
            *blocks,
            AverageAndMaxPool(),
            nn.Dropout(dropout),
            nn.Linear(2 * widths[-1], num_classes),
        )

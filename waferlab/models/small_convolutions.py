"""Convolutions that learn quickly on images hardly larger than their kernel.

Wafer maps are small: the last stages of a network made for photographs see 3x3, 2x2 or 1x1 pixels. There PyTorch's
gradient of a convolution on a CPU takes several times as long as the matrix products that it consists of
(`benchmarks/training_throughput.py`), and it is most of the training time of a ResNet18 or an EfficientNet-B0.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

MAX_PIXELS = 9  # of the input, where the products win; measured for ResNet18 and EfficientNet-B0
LEAST_KERNELS = 2**17  # input times output channels from which on they win on the way forward, too


class SmallImageConv2d(nn.Conv2d):
    """`nn.Conv2d` by other ways where they are quicker: on a CPU, in float32, on tiny images, in training.

    Parameters and state dict are those of `nn.Conv2d`, output and gradients equal to its to within rounding. Elsewhere,
    and outside training, it is `nn.Conv2d`.
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
            and (self.groups == 1 or (depthwise and max(self.kernel_size) > min(x.shape[-2:])))
        )


def quicken_small_convolutions(network: nn.Module) -> None:
    """Turns the convolutions of a network into `SmallImageConv2d`, with their parameters as they are."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallImageConv2d


class _Convolution(torch.autograd.Function):
    """A sum over the taps of the kernel, each a product of the pixels that it joins; no border of zeros is multiplied.

    Forward only where that is half of the work and the products are large, else as ever.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding, groups):
        sizes = list(zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True))
        axes, outputs = [_joined(*of_axis) for of_axis in sizes], [_outputs(*of_axis) for of_axis in sizes]
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.taps = groups, [tuple(zip(*both, strict=True)) for both in itertools.product(*axes)]
        joined = math.prod(sum(to.stop - to.start for _, to, _ in axis) for axis in axes)
        every = math.prod(outputs) * weight[0, 0].numel()
        if groups > 1 or weight.shape[0] * weight.shape[1] < LEAST_KERNELS or 2 * joined > every:
            return torch.conv2d(x, weight, None, stride, padding, 1, groups)
        pixels, out = _channels_last(x), x.new_zeros(len(x), *outputs, len(weight))
        for tap, to, of in ctx.taps:
            out[:, *to] += pixels[:, *of] @ weight[:, :, *tap].T
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        pixels, errors = _channels_last(x), _channels_last(grad)
        grad_x = torch.zeros_like(pixels)
        grad_weight = torch.zeros_like(weight, memory_format=torch.channels_last)
        for tap, to, of in ctx.taps:
            seen, error = pixels[:, *of], errors[:, *to]
            if ctx.groups == 1:
                error = error.reshape(-1, error.shape[-1])
                grad_weight[:, :, *tap].addmm_(error.T, seen.reshape(-1, seen.shape[-1]))
                grad_x[:, *of] += (error @ weight[:, :, *tap]).view_as(seen)
            else:
                grad_weight[:, 0, *tap] = (error * seen).sum((0, 1, 2))
                grad_x[:, *of].addcmul_(error, weight[:, 0, *tap])
        return grad_x.permute(0, 3, 1, 2), grad_weight, None, None, None


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] as [B, H, W, C], contiguous."""
    return images.permute(0, 2, 3, 1).contiguous()


def _joined(size: int, width: int, stride: int, padding: int) -> list[tuple[int, slice, slice]]:
    """Along one axis, each tap of the kernel that meets the image, with the output and the input pixels it joins."""
    outputs, found = _outputs(size, width, stride, padding), []
    for tap in range(width):
        meeting = [out for out in range(outputs) if 0 <= out * stride - padding + tap < size]
        if meeting:
            first, last = (out * stride - padding + tap for out in (meeting[0], meeting[-1]))
            found.append((tap, slice(meeting[0], meeting[-1] + 1), slice(first, last + 1, stride)))
    return found


def _outputs(size: int, width: int, stride: int, padding: int) -> int:
    """Pixels of the output along one axis."""
    return (size + 2 * padding - width) // stride + 1

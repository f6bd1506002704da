"""Promises about convolutions on tiny images: the same answers and gradients as PyTorch's, sooner."""

import copy

import pytest
import torch
from torch import nn

from waferlab.models import small_convolutions
from waferlab.models.small_convolutions import SmallImageConv2d, quicken_small_convolutions
from waferlab.models.torchvision_models import TorchvisionLightningModel

GEOMETRIES = {  # channels in, out, image, kernel, stride, groups
    "1x1 image": (6, 10, 1, 3, 1, 1),
    "2x2 image": (6, 10, 2, 3, 1, 1),
    "3x3 image": (6, 10, 3, 3, 1, 1),
    "halved": (6, 10, 3, 3, 2, 1),
    "pointwise": (6, 10, 2, 1, 1, 1),
    "pointwise, halved": (6, 10, 3, 1, 2, 1),
    "many channels": (384, 384, 2, 3, 1, 1),  # enough that the way forward is another, too
    "many channels, halved": (384, 512, 3, 3, 2, 1),
    "depthwise": (6, 6, 2, 5, 1, 6),
    "depthwise, halved": (6, 6, 3, 5, 2, 6),
}


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(0, 1, y.numel()).reshape(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_are_those_of_pytorch(geometry, memory_format, monkeypatch):
    channels, out, size, kernel, stride, groups = GEOMETRIES[geometry]
    theirs = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups).to(memory_format=memory_format)
    ours = copy.deepcopy(theirs)
    quicken_small_convolutions(ours)
    x = torch.randn(5, channels, size, size).to(memory_format=memory_format)
    expected = gradients(theirs, x)
    used = []
    apply = small_convolutions._Convolution.apply
    monkeypatch.setattr(small_convolutions._Convolution, "apply", lambda *a: used.append(1) or apply(*a))
    for ours_one, theirs_one in zip(gradients(ours, x), expected, strict=True):
        torch.testing.assert_close(ours_one, theirs_one)
    assert used  # it was the other way that was compared


def test_elsewhere_it_is_pytorchs_own(monkeypatch):
    monkeypatch.setattr(small_convolutions._Convolution, "apply", lambda *a: pytest.fail("the other way was taken"))
    layer = nn.Conv2d(4, 4, 3, padding=1)
    quicken_small_convolutions(layer)
    assert type(layer) is SmallImageConv2d
    layer(torch.randn(2, 4, 8, 8))  # a large image
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 4, 2, 2))
    layer.double()(torch.randn(2, 4, 2, 2).double())
    layer.float().eval()(torch.randn(2, 4, 2, 2))  # outside training
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    quicken_small_convolutions(depthwise)
    depthwise(torch.randn(2, 4, 3, 3))  # which PyTorch does well, as long as the kernel is no larger than the image
    frozen = layer.train().requires_grad_(False)
    frozen(torch.randn(2, 4, 2, 2))


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b0"])
def test_a_network_learns_the_same_with_it(architecture):
    ours = TorchvisionLightningModel(architecture=architecture, dropout=0.0).network.train()
    for module in ours.modules():  # stochastic depth would drop other blocks in the second network
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        if type(module) is SmallImageConv2d:
            module.__class__ = nn.Conv2d
    images = torch.randn(8, 1, 40, 40)
    for network in (ours, theirs):
        network(images).square().mean().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

"""Muon: steps that change all directions of a kernel alike, for small networks that have little time to learn.

Jordan 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon). PyTorch has
it for matrices; kernels of convolutions are taken here as matrices of output channels by all that they see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, and how many of its steps suffice (Jordan 2024)
ITERATIONS = 5
SIZE_OF_ADAMW = 0.2  # root mean square of a step in units of the learning rate (Liu et al. 2025, arXiv 2502.16982)
MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW's part


class Muon(torch.optim.Optimizer):
    """Orthogonal steps for the kernels of hidden layers, AdamW's for all else.

    A step is as large as one of AdamW would be, so that learning rates and weight decays of AdamW fit. It costs
    products of the rows of a kernel with each other: little for the small CNN, more than all else for a ResNet18.

    Args:
        hidden: kernels [out, ...] of hidden layers.
        others: parameter groups of AdamW.
        lr: learning rate.
        weight_decay: of the hidden kernels.
    """

    def __init__(
        self, hidden: Sequence[nn.Parameter], others: Sequence[dict], *, lr: float, weight_decay: float
    ) -> None:
        groups = [{"params": list(hidden), "weight_decay": weight_decay, "orthogonal": True}]
        super().__init__([*groups, *others], {"lr": lr, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step; returns what `closure` does, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal_step if group["orthogonal"] else self._adamw_step)(group, trained)
        return loss

    def _orthogonal_step(self, group: dict, kernels: list[nn.Parameter]) -> None:
        for kernel in kernels:
            state = self.state[kernel]
            if not state:
                state["momentum"] = torch.zeros_like(kernel)
            state["momentum"].lerp_(kernel.grad, 1 - MOMENTUM)
            ahead = kernel.grad.lerp(state["momentum"], MOMENTUM)  # as Nesterov does
            step = orthogonalized(ahead.flatten(1)).view_as(kernel)
            size = SIZE_OF_ADAMW * max(kernel.shape[0], kernel[0].numel()) ** 0.5
            kernel.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"] * size)

    def _adamw_step(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters, [parameter.grad for parameter in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")), [],
            [state["step"] for state in states], fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=EPS, maximize=False,
        )  # fmt: skip


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix [m, n] with all singular values near 1 (0.7 to 1.2), by a Newton-Schulz iteration.

    Each of its steps multiplies by a polynomial in the products of rows with each other. These polynomials are put
    together first, which takes products of the shorter side only: a third of the work for kernels of 3x3.
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    rows, whole = x @ x.T, None
    for _ in range(ITERATIONS):
        step = torch.addmm(rows, rows, rows, beta=b, alpha=c)
        step.diagonal().add_(a)
        rows = step @ rows @ step
        whole = step if whole is None else step @ whole
    x = whole @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def hidden_kernels(network: nn.Module) -> list[nn.Parameter]:
    """Kernels of convolutions and linear layers, but for the first and the last layer and for depthwise ones."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [layer.weight for layer in layers[1:-1] if getattr(layer, "groups", 1) == 1 and layer.weight.requires_grad]

"""Muon optimizer: momentum, with each matrix's update made orthogonal (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # published coefficients: bring every singular value near 1 in 5 rounds


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Bring the singular values of matrices (..., M, N) near 1, between about 0.7 and 1.2."""
    a, b, c = QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon in float32, for matrices only; entries move about as far as with AdamW at the same learning rate.

    torch's own Muon works in bfloat16, which is many times slower than float32 on a CPU without support
    for it.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take one step; matrices of the same shape are orthogonalized together."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                directions = orthogonal(
                    torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                )
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _momentum(self, parameter: nn.Parameter, weight: float) -> Tensor:
        mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
        gradient = cast(Tensor, parameter.grad)  # `step` skips parameters without one
        mean.lerp_(gradient, 1 - weight)
        return gradient.lerp(mean, weight)  # Nesterov momentum

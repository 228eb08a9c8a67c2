"""Objectives that need no reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from capo.objectives.base import PairErrors, fields_of, positive, requires

SMALL = 0.01  # below it the next term of the series, x^6 / 30240, is under 1e-16


@requires(reference=False, loser=False)
def sft(errors: PairErrors, *, beta: float | None = None) -> Tensor:
    """Supervised fine-tuning on the winner (control): its error m+, unweighted, (B,); beta is ignored."""
    return errors.policy_winner


@requires(reference=False)
def mapo(errors: PairErrors, *, beta: float, scale: float = 0.5, factor: float = 1000.0) -> Tensor:
    """MaPO: `m+ + beta softplus(-factor (f(m+) - f(m-)))` with `f(m) = s m / (exp(s m) - 1)`, per pair.

    The first part trains on the winner, the second raises it above the loser, and nothing holds the policy to
    the base. Where the errors are equal the loss is m+ + beta log 2. Neither w nor dR is read: the beta is
    the share of the preference, not that of the other objectives.

    Args:
        errors: policy_winner and policy_loser are read.
        beta: positive; published: 0.1.
        scale: s, positive.
        factor: positive; published: 1000, the number of times.

    Returns:
        (B,) losses in the dtype of the errors.

    Raises:
        InputError: if beta, scale or factor is not positive.
        ValueError: if a field is None.
    """
    for name, value in {"beta": beta, "scale": scale, "factor": factor}.items():
        positive(name, value)
    winner, loser = fields_of(errors, "policy_winner", "policy_loser")
    ahead = factor * (bernoulli(scale * winner) - bernoulli(scale * loser))
    return (winner - beta * functional.logsigmoid(ahead)).to(errors.policy_winner.dtype)


def bernoulli(x: Tensor) -> Tensor:
    """`x / (exp(x) - 1)` for x >= 0, of any shape, 1 at x = 0; with gradients, near 0 by its series."""
    small = x < SMALL
    away = torch.where(small, torch.ones_like(x), x)  # where's gradient is NaN if either side is
    return torch.where(small, 1 - x / 2 + x**2 / 12 - x**4 / 720, away / away.expm1())

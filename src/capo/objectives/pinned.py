"""Pinning: on a share of the pairs, the policy learns to predict without a prompt what the reference does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from capo.errors import ParameterError
from capo.objectives.averaging import INSIDE, OUTSIDE
from capo.objectives.base import Group, PairErrors, Predictions, Requirements, fields_of

Parts = TypeVar("Parts", bound=PairErrors | Predictions | Group)
DIGITS = 4096  # u is a multiple of 2^-24 in float32: u * 4096 is exact and leaves at least 12 binary digits


def check_pinned(share: float, needs: Requirements, reduction: str = OUTSIDE) -> None:
    """Raise ParameterError unless `share` is in [0, 1), or if nothing can be pinned.

    That is so where the objective has no reference to pin to, and where the loss is of a mean margin over
    times, some of which would be pinned.
    """
    if not 0 <= share < 1:
        raise ParameterError("pinned", share, "must be a number from 0 to less than 1")
    if share and not needs.reference:
        raise ParameterError(
            "pinned", share, "must be 0, since this objective trains without a reference to pin the policy to"
        )
    if share and reduction == INSIDE:
        raise ParameterError(
            "pinned", share, "must be 0 with noise.reduction=inside; choose noise.reduction=outside"
        )


def pinned_rows(u: Tensor, share: float) -> Tensor:
    """Choose the pinned pairs: `frac(4096 u) < share`, a bool mask (B,).

    The choice is a function of u (B,) in [0, 1), and so of seed, prompt and visit. It takes the low digits of
    u, so that pinned pairs have times from the whole range.
    """
    return torch.frac(u.float() * DIGITS) < share


def pinned_loss(errors: PairErrors, beta: float | None) -> Tensor:
    """Loss of a pinned pair, `beta w mean((policy - reference)^2)`, (B,) float32.

    The mean is over the latents of the pair (or group), channels, height and width. Without a beta, it counts
    as 1. Raises ValueError if the errors hold no predictions of policy and reference.
    """
    if errors.predictions is None or errors.predictions.reference is None:
        raise ValueError("a pinned pair needs the predictions of policy and reference")
    (weight,) = fields_of(errors, "weight")
    apart = errors.predictions.policy - errors.predictions.reference
    return (1.0 if beta is None else beta) * weight * apart.square().mean(dim=(1, 2, 3, 4))


def select_rows(errors: PairErrors, rows: Tensor) -> PairErrors:
    """Keep the pairs of `errors` where the mask `rows` (B,) is true."""

    def kept(value: Any) -> Any:  # a tensor, predictions, a group, or None
        if isinstance(value, Predictions | Group):
            return _map(kept, value)
        return None if value is None else value[rows]

    return _map(kept, errors)


def _map(function: Callable[[Any], Any], parts: Parts) -> Parts:
    return replace(parts, **{field.name: function(getattr(parts, field.name)) for field in fields(parts)})

"""Objectives on the margin of a pair against the reference: DPO, IPO, CaPO (eq. 8 and 22)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from capo.objectives.base import PairErrors, fields_of, requires, scaled_margin


@requires()
def dpo(errors: PairErrors, *, beta: float) -> Tensor:
    """Diffusion-DPO: softplus(-beta h) per pair (eq. 22); log 2 where policy = reference.

    errors: all but gap. beta > 0; half the beta of the Diffusion-DPO code (its factor -0.5) at w = 1 and
        shared noise. Returns (B,) in the errors' dtype. Raises InputError for beta, ValueError for a field
        that is None.
    """
    # not softplus, which becomes linear at 20 and is off by 2e-9 there
    return -functional.logsigmoid(scaled_margin(errors, beta)).to(errors.policy_winner.dtype)


@requires()
def ipo(errors: PairErrors, *, beta: float) -> Tensor:
    """IPO: (1 - beta h)^2 per pair (eq. 22); 1 where policy = reference. Arguments and errors as in `dpo`."""
    return (1 - scaled_margin(errors, beta)).square().to(errors.policy_winner.dtype)


@requires()
def capo(errors: PairErrors, *, beta: float) -> Tensor:
    """CaPO: (dR - beta h)^2 per pair (eq. 8), IPO towards the calibrated gap; dR^2 where policy = reference.

    errors: all fields. beta > 0. Returns (B,) in the errors' dtype. Raises InputError for beta, ValueError
        for a field that is None.
    """
    (gap,) = fields_of(errors, "gap")
    return (gap - scaled_margin(errors, beta)).square().to(errors.policy_winner.dtype)

"""Objectives: denoising errors and calibrated gap -> loss of each pair (CaPO, eq. 8 and 22).

One function an objective, all with the signature `(errors, *, beta) -> (B,)`, and each declares with
`@requires` what it reads, so that nothing else is computed. To add one, write the function, declare what it
requires, and give it a file in the Hydra group `objective`; whatever new it reads becomes an optional field
of `PairErrors`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from capo.errors import InputError


@dataclass(frozen=True)
class PairErrors:
    """What is known of a batch of pairs after the forward passes; each field (B,) or None.

    An error is the mean over channels, height and width of the squared difference of prediction and target,
    computed in float32: targets are dR / beta, about 7e-4, which bf16 cannot resolve beside an error of 0.3.

    Attributes:
        policy_winner: m+, the policy's error on the winner.
        reference_winner: r+, the frozen reference's error on the same noisy latent, time, prompt and target.
        policy_loser: m-, likewise on the loser.
        reference_loser: r-, likewise.
        weight: w, the weight of the pair's log-SNR (winner and loser share their time).
        gap: dR, calibrated reward of the winner minus that of the loser.
    """

    policy_winner: Tensor
    reference_winner: Tensor | None = None
    policy_loser: Tensor | None = None
    reference_loser: Tensor | None = None
    weight: Tensor | None = None
    gap: Tensor | None = None


Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class Requirements:
    """What an objective reads: the reference's errors, the networks' predictions, the loser's errors."""

    reference: bool
    predictions: bool
    loser: bool


def requires(
    *, reference: bool = True, predictions: bool = False, loser: bool = True
) -> Callable[[Objective], Objective]:
    """Declare what an objective reads: its attributes needs_reference, needs_predictions and needs_loser."""

    def declare(objective: Objective) -> Objective:
        objective.needs_reference = reference
        objective.needs_predictions = predictions
        objective.needs_loser = loser
        return objective

    return declare


def requirements(objective: Objective) -> Requirements:
    """What an objective, or a `functools.partial` of one as Hydra makes it, declares to read.

    Raises InputError where it declares nothing.
    """
    while isinstance(objective, functools.partial):
        objective = objective.func
    try:
        return Requirements(objective.needs_reference, objective.needs_predictions, objective.needs_loser)
    except AttributeError:
        raise InputError(
            f"{objective!r} does not declare what it reads; decorate it with capo.objectives.requires"
        ) from None


def implicit_rewards(errors: PairErrors) -> tuple[Tensor, Tensor]:
    """R_theta = -w (m - r) of winner and loser, each (B,): positive where the policy denoises better.

    (lam' is negative and taken as the constant -1; no factor 1/2.) Half precision gives float32. Raises
    ValueError for a field that is None.
    """
    policy_winner, reference_winner, policy_loser, reference_loser, weight = _fields(
        errors, "policy_winner", "reference_winner", "policy_loser", "reference_loser", "weight"
    )
    return -weight * (policy_winner - reference_winner), -weight * (policy_loser - reference_loser)


def margin(errors: PairErrors) -> Tensor:
    """h = R_theta(x+) - R_theta(x-), (B,): exactly 0 where policy and reference err alike.

    dtype and errors as for `implicit_rewards`.
    """
    winner, loser = implicit_rewards(errors)
    return winner - loser


@requires()
def dpo(errors: PairErrors, *, beta: float) -> Tensor:
    """Diffusion-DPO: softplus(-beta h) per pair (eq. 22); log 2 where policy = reference.

    errors: all but gap. beta > 0; half the beta of the Diffusion-DPO code (its factor -0.5) at w = 1 and
        shared noise. Returns (B,) in the errors' dtype. Raises InputError for beta, ValueError for a field
        that is None.
    """
    # not softplus, which becomes linear at 20 and is off by 2e-9 there
    return -functional.logsigmoid(_scaled_margin(errors, beta)).to(errors.policy_winner.dtype)


@requires()
def ipo(errors: PairErrors, *, beta: float) -> Tensor:
    """IPO: (1 - beta h)^2 per pair (eq. 22); 1 where policy = reference. Arguments and errors as in `dpo`."""
    return (1 - _scaled_margin(errors, beta)).square().to(errors.policy_winner.dtype)


@requires()
def capo(errors: PairErrors, *, beta: float) -> Tensor:
    """CaPO: (dR - beta h)^2 per pair (eq. 8), IPO towards the calibrated gap; dR^2 where policy = reference.

    errors: all fields. beta > 0. Returns (B,) in the errors' dtype. Raises InputError for beta, ValueError
        for a field that is None.
    """
    (gap,) = _fields(errors, "gap")
    return (gap - _scaled_margin(errors, beta)).square().to(errors.policy_winner.dtype)


@requires(reference=False, loser=False)
def sft(errors: PairErrors, *, beta: float | None = None) -> Tensor:
    """Fine-tuning on the winner (control): m+ per pair, unweighted, (B,), dtype kept; beta is not used."""
    return errors.policy_winner


def _scaled_margin(errors: PairErrors, beta: float) -> Tensor:
    if beta is None or not beta > 0:
        raise InputError(
            f"objective.beta={beta} must be a positive number; the model's yaml has one that suits it"
        )
    return beta * margin(errors)


def _fields(errors: PairErrors, *names: str) -> list[Tensor]:
    """The named fields in float32 at least; ValueError for one that is None."""
    missing = [name for name in names if getattr(errors, name) is None]
    if missing:
        raise ValueError(f"PairErrors has no {', '.join(missing)}, which the objective reads")
    values = [getattr(errors, name) for name in names]
    return [value if value.dtype == torch.float64 else value.float() for value in values]

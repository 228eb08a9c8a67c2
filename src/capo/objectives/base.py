"""Inputs of the objectives, and the implicit rewards and margin that most of them share (CaPO, eq. 22)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from capo.errors import InputError, ParameterError
from capo.runtime.dtypes import at_least_float32
from capo.runtime.own_code import called_by, faults_of, name_of


@dataclass(frozen=True)
class Predictions:
    """Predictions of the networks for B prompts with k candidates each, in float32; the winner comes first.

    An error is the mean of `(policy - target)^2` or `(reference - target)^2` over channels, height and width.

    Attributes:
        policy: (B, k, C, H, W) predictions of the policy, with gradients.
        target: (B, k, C, H, W) targets of the predictions, the noise or the velocity (`Backbone.target`).
        reference: (B, k, C, H, W) predictions of the frozen reference; None if the objective reads none.
    """

    policy: Tensor
    target: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Errors and calibrated rewards of k candidates of each of B prompts, the winner first, the loser last.

    Attributes:
        policy: (B, k) errors of the policy, with gradients.
        rewards: (B, k) calibrated rewards R_ca, averaged over the rewards.
        reference: (B, k) errors of the frozen reference; None if the objective reads none.
    """

    policy: Tensor
    rewards: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class PairErrors:
    """Denoising errors, weights and gaps of a batch of B pairs after the forward passes; each (B,) or None.

    An error is the mean over channels, height and width of the squared difference of prediction and target.
    It is computed in float32: the objectives act on differences of about dR / beta = 7e-4, which bf16 cannot
    resolve in an error of 0.3.

    Attributes:
        policy_winner: m+, the policy's error on the winner.
        reference_winner: r+, the frozen reference's error on the same noisy latent, time, prompt and target.
        policy_loser: m-, the policy's error on the loser.
        reference_loser: r-, the reference's error on the loser.
        weight: w, the weight at the pair's log-SNR (winner and loser share their time).
        gap: dR, the calibrated reward of the winner minus that of the loser.
        predictions: predictions and targets, for an objective that declares `predictions=True`; else None.
        group: errors and rewards of each candidate, for an objective that declares `group=True`; else None.
        kl: mean of r - m over all candidates of the batch and all processes, the same number for each pair,
            without gradients, for an objective that declares `kl=True`; else None.
    """

    policy_winner: Tensor
    reference_winner: Tensor | None = None
    policy_loser: Tensor | None = None
    reference_loser: Tensor | None = None
    weight: Tensor | None = None
    gap: Tensor | None = None
    predictions: Predictions | None = None
    group: Group | None = None
    kl: Tensor | None = None


Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class Requirements:
    """Inputs of an objective, as `requires` declares them.

    Attributes:
        reference: the reference's errors.
        predictions: the networks' predictions.
        loser: the loser's errors.
        group: errors and calibrated reward of each candidate.
        kl: the mean of r - m over the batch.
        shared_noise: the same noise for winner and loser.
    """

    reference: bool
    predictions: bool
    loser: bool
    group: bool = False
    kl: bool = False
    shared_noise: bool = False


def requires(
    objective: Objective | None = None,
    /,
    *,
    reference: bool = True,
    predictions: bool = False,
    loser: bool = True,
    group: bool = False,
    kl: bool = False,
    shared_noise: bool = False,
) -> Any:
    """Decorator, with or without parentheses, that attaches to an objective which inputs it reads.

    The arguments are those of `Requirements`.
    """

    def declare(objective: Objective) -> Objective:
        objective.requirements = Requirements(reference, predictions, loser, group, kl, shared_noise)
        return objective

    return declare if objective is None else declare(objective)


def requirements(objective: Objective) -> Requirements:
    """Inputs that an objective, or a `functools.partial` of one as Hydra makes it, declares that it reads.

    Raises InputError for a function that is not decorated with `requires`.
    """
    declared = getattr(called_by(objective), "requirements", None)
    if not isinstance(declared, Requirements):
        raise InputError(
            f"{name_of(objective)} does not declare what it reads; "
            "write @requires() from capo.objectives above it"
        )
    return declared


def joined(first: PairErrors, second: PairErrors) -> PairErrors:
    """Errors of two batches one after the other, without gradients, predictions and group."""
    parts: dict[str, Any] = {
        name: torch.cat([value.detach(), getattr(second, name).detach()])
        for name, value in vars(first).items()
        if isinstance(value, Tensor)
    }
    return PairErrors(**parts)


def at_reference(errors: PairErrors) -> PairErrors:
    """Errors as they would be if the policy were the reference; predictions are left as they are."""
    group = errors.group and replace(errors.group, policy=errors.group.reference)
    kl = None if errors.kl is None else torch.zeros_like(errors.kl)
    own = {"policy_winner": errors.reference_winner, "policy_loser": errors.reference_loser}
    return replace(errors, group=group, kl=kl, **own)


def check_shared_noise(shared: bool, needs: Requirements) -> None:
    """Raise ParameterError if winner and loser have noise of their own, but the objective compares them."""
    if needs.shared_noise and not shared:
        raise ParameterError(
            "shared",
            shared,
            "must be true, since the objective compares the errors of winner and loser under the same noise",
        )


def beta_of(objective: Objective) -> float | None:
    """The beta that is bound to a `functools.partial` of an objective; None if it has none."""
    return objective.keywords.get("beta") if isinstance(objective, functools.partial) else None


@torch.enable_grad()
def try_objective(objective: Objective) -> None:
    """Call an objective on three synthetic pairs, which have only the inputs that it declares.

    All errors of the policy are those of the reference, as at the start of training. Raises InputError if the
    objective raises, or if it does not return finite losses of shape (B,), with finite gradients by the
    policy's errors or predictions.
    """
    needs, what = requirements(objective), f"the objective {name_of(objective)}"
    with faults_of(f"{what} on three made-up pairs"):
        errors, leaves = _made_up(needs)
        losses = objective(errors)
    if (fault := _fault(losses, leaves)) is not None:
        raise InputError(f"{what} returned {fault}; correct it, or its arguments")


def losses_of(objective: Objective, errors: PairErrors) -> Tensor:
    """Losses (B,) of an objective; InputError if it raises, or returns another shape."""
    what, shape = f"the objective {name_of(objective)}", errors.policy_winner.shape
    with faults_of(what):
        losses = objective(errors)
    if (fault := _form_fault(losses, shape)) is not None:
        raise InputError(f"{what} returned {fault}")
    return losses


def _form_fault(losses: object, shape: Sequence[int]) -> str | None:
    """What is wrong with the type or shape of losses, which must have `shape`; None if nothing is."""
    if not isinstance(losses, Tensor):
        return f"a {type(losses).__name__}: it must return a tensor, a loss per pair"
    if losses.shape != tuple(shape):
        return f"losses of shape {tuple(losses.shape)} for {shape[0]} pairs: it must return {tuple(shape)}"
    return None


def _fault(losses: object, leaves: Sequence[Tensor]) -> str | None:
    """What is wrong with the losses of three pairs, of which `leaves` carry gradients; None if nothing is."""
    if (fault := _form_fault(losses, (3,))) is not None:
        return fault
    assert isinstance(losses, Tensor)
    start = "where policy = reference, as at the start of training"
    if not losses.isfinite().all():
        return f"losses that are not finite {start}: {losses.tolist()}"
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True) if losses.requires_grad else ()
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        return "losses that do not depend on the policy's errors or predictions: no gradient would train it"
    if not all(gradient.isfinite().all() for gradient in reached):
        return f"losses whose gradient by the policy's errors or predictions is not finite {start}"
    return None


def _made_up(needs: Requirements) -> tuple[PairErrors, list[Tensor]]:
    """Three pairs with the inputs that are declared, and the policy's tensors that carry gradients."""
    leaves: list[Tensor] = []

    def of_policy(value: Tensor) -> Tensor:
        leaves.append(value.clone().requires_grad_())
        return leaves[-1].clone()  # not a leaf itself, as in training

    read = {"gap": needs.loser, "reference_winner": needs.reference, "weight": True, "kl": needs.kl}
    read |= {"reference_loser": needs.reference and needs.loser}
    errors: dict[str, Any] = {name: torch.full((3,), 0.2) for name, known in read.items() if known}
    for name in ("policy_winner", "policy_loser")[: 1 + needs.loser]:
        errors[name] = of_policy(torch.full((3,), 0.2))
    if needs.group:
        each = torch.full((3, 2), 0.2)
        reference = each if needs.reference else None
        errors["group"] = Group(of_policy(each), each + torch.tensor([0.5, 0.0]), reference)
    if needs.predictions:
        made_up = torch.zeros(3, 2 if needs.loser else 1, 1, 2, 2)
        reference = made_up if needs.reference else None
        errors["predictions"] = Predictions(of_policy(made_up), made_up + 0.5, reference)
    return PairErrors(**errors), leaves


def implicit_rewards(errors: PairErrors) -> tuple[Tensor, Tensor]:
    """Implicit rewards `R_theta = -w (m - r)` of winner and loser, each (B,).

    They are positive where the policy denoises better than the reference. (lam' is negative and taken as the
    constant -1; there is no factor 1/2.) Half precision gives float32. Raises ValueError if a field is None.
    """
    policy_winner, reference_winner, policy_loser, reference_loser, weight = fields_of(
        errors, "policy_winner", "reference_winner", "policy_loser", "reference_loser", "weight"
    )
    return -weight * (policy_winner - reference_winner), -weight * (policy_loser - reference_loser)


def margin(errors: PairErrors) -> Tensor:
    """Margin `h = R_theta(x+) - R_theta(x-)`, (B,); exactly 0 where policy and reference have equal errors.

    Dtype and exceptions are those of `implicit_rewards`.
    """
    winner, loser = implicit_rewards(errors)
    return winner - loser


def scaled_margin(errors: PairErrors, beta: float) -> Tensor:
    """Scaled margin `beta h`, (B,). Raises InputError if beta is not positive, else as `margin`."""
    return positive("beta", beta) * margin(errors)


def positive(name: str, value: float | None) -> float:
    """The value of the parameter `name`. Raises ParameterError (an InputError) unless it is positive."""
    if value is None or not value > 0:
        raise ParameterError(name, value, "must be a positive number")
    return value


def fields_of(errors: PairErrors, *names: str) -> list[Tensor]:
    """The named fields in float32 or float64. Raises ValueError if one is None."""
    missing = [name for name in names if getattr(errors, name) is None]
    if missing:
        raise ValueError(f"PairErrors has no {', '.join(missing)}, which the objective reads")
    return [at_least_float32(getattr(errors, name)) for name in names]


def group_of(errors: PairErrors) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of the policy, those of the reference and rewards, (B, k) each, in float32 or float64.

    Raises ValueError if the errors hold no group, or one without a reference.
    """
    group = errors.group
    if group is None or group.reference is None:
        raise ValueError("PairErrors has no group with a reference, which the objective reads")
    policy, reference, rewards = map(at_least_float32, (group.policy, group.reference, group.rewards))
    return policy, reference, rewards

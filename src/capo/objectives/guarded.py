"""A guard for pairwise objectives: the loser's gradient may not raise the winner's error (Diffusion-SDPO)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from capo.errors import ParameterError
from capo.objectives.base import Objective, PairErrors, requirements, requires
from capo.objectives.pairwise import dpo


def guarded(objective: Objective, *, mu: float) -> Objective:
    """The objective with the loser's gradient scaled by `loser_share(errors, mu)`; its value is unchanged.

    A step against the gradient then lowers the winner's error, to first order and in the space of
    predictions, by at least mu of what the winner's own part lowers it by. Diffusion-SDPO takes one factor
    for each micro-batch; here each pair has its own.

    Args:
        objective: reads the errors of winner and loser, such as `capo`.
        mu: from 0 (the loser may undo all of it) to 1 (a loser whose error overlaps pulls on nothing).

    Returns:
        An objective with the arguments of the one that is given. It needs noise that winner and loser share:
        with noise of their own their errors hardly overlap, and the guard does nothing.

    Raises:
        ParameterError: mu is out of its range.
        ValueError: the objective reads no loser, or each candidate by itself.
    """
    needs = requirements(objective)
    if not 0 <= mu <= 1:
        raise ParameterError("mu", mu, "must be a number from 0 to 1")
    if needs.group or not needs.loser:
        raise ValueError("only an objective of a winner and a loser has a loser's gradient to guard")

    @requires(reference=needs.reference, predictions=True, kl=needs.kl, shared_noise=True)
    def guarded_objective(errors: PairErrors, **arguments: float) -> Tensor:
        loser = errors.policy_loser
        if loser is None:
            raise ValueError("PairErrors has no policy_loser, which the objective reads")
        fixed = loser.detach()
        # the difference is exactly 0
        slowed = fixed + loser_share(errors, mu).to(loser.dtype) * (loser - fixed)
        return objective(replace(errors, policy_loser=slowed), **arguments)

    return guarded_objective


@requires(predictions=True, shared_noise=True)
def sdpo(errors: PairErrors, *, beta: float, mu: float) -> Tensor:
    """Diffusion-SDPO: `guarded(dpo, mu=mu)`, (B,); value and errors are those of `dpo` and `guarded`."""
    return guarded(dpo, mu=mu)(errors, beta=beta)


def overlap(errors: PairErrors) -> Tensor:
    """Overlap `c = mean(e+ e-)` of the errors `e = prediction - target` on winner and loser, (B,).

    The mean is over channels, height and width, without gradients. Raises ValueError without predictions.
    """
    told = errors.predictions
    if told is None:
        raise ValueError("PairErrors has no predictions, which the objective reads")
    apart = told.policy.detach() - told.target
    return (apart[:, 0] * apart[:, -1]).mean(dim=(1, 2, 3))


def loser_share(errors: PairErrors, mu: float) -> Tensor:
    """Share `clamp((1 - mu) m+ / c, 0, 1)` of the loser's gradient, (B,); 1 where the overlap c is at most 0.

    With it, `<-g+ + share g-, g+> <= -mu |g+|^2` for the gradients g of both errors by the predictions.
    """
    c = overlap(errors)
    positive = torch.where(c > 0, c, 1)
    share = ((1 - mu) * errors.policy_winner.detach() / positive).clamp(0, 1)
    return torch.where(c > 0, share, 1)

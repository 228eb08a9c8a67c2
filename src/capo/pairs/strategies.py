"""Pair selection: scores and calibrated rewards -> candidates that may win or lose (CaPO, section 4.3).

A *strategy* is a function `(scores, calibrated, *, ...) -> PairSets`; each file of the Hydra group `pairs`
names one. `capo.data.selection` applies a strategy to a whole pool and draws pairs from the sets it returns.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from capo.errors import InputError, ParameterError
from capo.pairs.depth import deep_frontiers
from capo.pairs.fronts import check_finite, fronts, without_common
from capo.runtime.own_code import called_by


class PairSets(NamedTuple):
    """Candidates of each prompt that may win, and that may lose: two bool masks (P, N)."""

    winners: Tensor
    losers: Tensor


Strategy = Callable[[Tensor, Tensor], PairSets]
Declared = TypeVar("Declared", bound=Callable[..., PairSets])


@dataclass(frozen=True)
class Declaration:
    """Properties that a strategy declares with `declares`; the defaults hold for one that declares none.

    Attributes:
        rewards: number of rewards that the strategy accepts; None: any number.
        weights: name of the keyword argument with the weights of the rewards, which dR uses too; None: dR
            uses equal weights.
        lower_set: name of the keyword argument that chooses how losers are taken from the frontiers; None:
            the strategy does not use frontiers.
    """

    rewards: int | None = None
    weights: str | None = None
    lower_set: str | None = None


def declares(
    *, rewards: int | None = None, weights: str | None = None, lower_set: str | None = None
) -> Callable[[Declared], Declared]:
    """Decorator that attaches a `Declaration` with these properties to a strategy."""

    def declare(strategy: Declared) -> Declared:
        strategy.declaration = Declaration(rewards, weights, lower_set)
        return strategy

    return declare


def declaration(strategy: Strategy) -> Declaration:
    """Declaration of a strategy, or of a `functools.partial` of one as Hydra makes it."""
    return getattr(called_by(strategy), "declaration", Declaration())


def argument(strategy: Strategy, name: str | None) -> Any:
    """Value of a strategy's keyword argument, as bound by a partial or by default; None if `name` is None."""
    return None if name is None else inspect.signature(strategy).parameters[name].default


@declares(rewards=1)
def best_worst(scores: Tensor, calibrated: Tensor) -> PairSets:
    """Best against worst: by a single reward, the best candidate wins and the worst loses.

    Args:
        scores: (P, N, 1) raw scores, which decide, since win-rates are rounded.
        calibrated: (P, N, 1) calibrated rewards, not used.

    Returns:
        One-hot masks (P, N); among tied candidates the one with the lowest index is chosen.

    Raises:
        InputError: if there is more than one reward, or a score is not finite.
        ValueError: if the shapes do not match.
    """
    _check_shapes(scores, calibrated)
    if scores.shape[-1] != 1:
        raise InputError(
            f"best_worst orders the candidates by one reward, "
            f"but scores {tuple(scores.shape)} have {scores.shape[-1]}"
        )
    check_finite(scores)
    return _extremes(scores[..., 0])


@declares(weights="weights")
def reward_sum(scores: Tensor, calibrated: Tensor, *, weights: Sequence[float] | None = None) -> PairSets:
    """Sum of rewards: the highest weighted mean of calibrated rewards wins, the lowest loses.

    Args:
        scores: (P, N, L) raw scores, not used.
        calibrated: (P, N, L) calibrated rewards.
        weights: L weights, not negative, at least one positive; None: equal weights. The pair's gap dR is
            computed with the same weights.

    Returns:
        One-hot masks (P, N); among tied candidates the one with the lowest index is chosen.

    Raises:
        InputError: if the weights are not valid for L rewards.
        ValueError: if the shapes do not match.
    """
    _check_shapes(scores, calibrated)
    return _extremes(combined_rewards(calibrated, weights))


@declares(lower_set="lower")
def frs(scores: Tensor, calibrated: Tensor, *, lower: str = "frontier", depth: int | None = None) -> PairSets:
    """Frontier-based rejection sampling: winners from the upper frontier, losers from the lower one.

    Args:
        scores: (P, N, L) raw scores, which decide domination (`fronts`).
        calibrated: (P, N, L) calibrated rewards, not used.
        lower: which candidates may lose. `frontier` (figure 2): X+ is F+ without F-, X- is F- without F+.
            `all_dominated` is the paper's other reading ("set of dominated data"): X+ is F+, X- all other
            candidates. It gives dR <= 0 in 9 % of the pairs for independent rewards (4 % at a correlation of
            0.5), `frontier` in 0.7 % (0.06 %).
        depth: smallest number of candidates in each set, for many rewards, where most candidates are on both
            frontiers: smaller sets take candidates of the next fronts (`deep_frontiers`). None: no others
            than those of the frontiers.

    Returns:
        Masks (P, N), not filtered by dR.

    Raises:
        InputError: if `lower` is unknown, `depth` is not from 1 to N - 1 or given with another `lower` than
            `frontier`, or a score is not finite.
        ValueError: if the shapes do not match.
    """
    _check_shapes(scores, calibrated)
    if lower not in LOWER_SETS:
        raise ParameterError("lower", lower, f"must be one of {', '.join(LOWER_SETS)}")
    if depth is None:
        return LOWER_SETS[lower](*fronts(scores))
    if lower != "frontier":
        raise ParameterError("depth", depth, f"must be null with lower={lower}, whose losers are all others")
    count = scores.shape[1]
    if not 1 <= depth < count:
        raise ParameterError(
            "depth", depth, f"must be from 1 to {count - 1}: a prompt has {count} candidates"
        )
    return PairSets(*deep_frontiers(scores, depth))


LOWER_SETS: dict[str, Callable[[Tensor, Tensor], PairSets]] = {
    "frontier": lambda upper, lower: PairSets(*without_common(upper, lower)),
    "all_dominated": lambda upper, lower: PairSets(upper, ~upper),
}


def random_pair(scores: Tensor, calibrated: Tensor) -> PairSets:
    """Random pair: any two candidates, ordered by the mean of their calibrated rewards (control).

    scores and calibrated (P, N, L) -> two masks (P, N) that are true everywhere: only pairs with dR > 0 are
    drawn later, so of two candidates the better one wins. Raises ValueError if the shapes do not match.
    """
    _check_shapes(scores, calibrated)
    everyone = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    return PairSets(everyone, everyone.clone())


def combined_rewards(calibrated: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Mean of R_ca over the rewards (section 4.3); its difference between two candidates is the gap dR.

    Args:
        calibrated: (P, N, L) calibrated rewards.
        weights: L weights, not negative, at least one positive; None: equal weights.

    Returns:
        (P, N) weighted mean: float64 for float64 input, else float32. Equal candidates get bitwise equal
        means.

    Raises:
        InputError: if the weights are not valid for L rewards.
    """
    rewards = calibrated.shape[-1]
    weights = [1.0] * rewards if weights is None else [float(weight) for weight in weights]
    total = sum(weights)
    if len(weights) != rewards or not (all(weight >= 0 for weight in weights) and 0 < total < math.inf):
        must = "finite numbers, one for each reward in their order, none negative and one at least positive"
        raise ParameterError("weights", weights, f"must be {rewards} {must}")
    dtype = calibrated.dtype if calibrated.dtype == torch.float64 else torch.float32
    mean = torch.zeros(calibrated.shape[:-1], dtype=dtype, device=calibrated.device)
    # multiply, then add: a fused operation that rounds some elements differently would break ties
    for reward, weight in zip(calibrated.unbind(-1), weights, strict=True):
        mean += reward.to(dtype) * weight
    return mean / total


def _extremes(rewards: Tensor) -> PairSets:
    """(P, N) rewards -> one-hot masks of the highest and the lowest; among ties, the lowest index."""
    places = torch.arange(rewards.shape[1], device=rewards.device)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    return PairSets(places == best, places == worst)


def _check_shapes(scores: Tensor, calibrated: Tensor) -> None:
    if scores.ndim != 3 or scores.shape != calibrated.shape:
        raise ValueError(
            f"scores {tuple(scores.shape)} and calibrated {tuple(calibrated.shape)} must both be (P, N, L)"
        )

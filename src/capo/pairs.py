"""Pair selection: scores and calibrated rewards -> candidates that may win or lose (CaPO, section 4.3).

A *strategy* is a function `(scores, calibrated, *, ...) -> PairSets`; each file of the Hydra group `pairs`
names one. `capo.data.selection` applies a strategy to a whole pool and draws pairs from the sets it returns.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from capo.errors import InputError, ParameterError
from capo.runtime.threads import over_rows

BLOCK = 2**15  # candidates compared at a time, so that the comparisons fit in the L2 cache


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
    while isinstance(strategy, functools.partial):
        strategy = strategy.func
    return getattr(strategy, "declaration", Declaration())


def argument(strategy: Strategy, name: str | None) -> Any:
    """Value of a strategy's keyword argument, as bound by a partial or by default; None if `name` is None."""
    return None if name is None else inspect.signature(strategy).parameters[name].default


def fronts(scores: Tensor) -> tuple[Tensor, Tensor]:
    """F+ and F-: the candidates that no other dominates, and the candidates that dominate no other.

    `a` dominates `b` if `a` scores at least as high by every reward and higher by at least one. (This is
    strict Pareto domination: with the paper's literal >=, duplicates would dominate each other and F+ would
    be empty.)

    Args:
        scores: (P, N, L) raw scores. Win-rates would not do: rounding and the floor of the log link give them
            ties that the scores do not have.

    Returns:
        F+ and F-, two bool masks (P, N).

    Raises:
        InputError: if a score is not finite.
        ValueError: if the scores do not have three dimensions, or have no candidates or no rewards.
    """
    if scores.ndim != 3 or 0 in scores.shape[1:]:
        raise ValueError(f"scores must be (P, N, L) with candidates and rewards; got {tuple(scores.shape)}")
    _check_finite(scores)
    prompts, candidates, _ = scores.shape
    # NumPy is four times as fast here: PyTorch does not vectorize comparisons into bool tensors
    values = (
        scores.detach().to("cpu", torch.float32 if scores.dtype == torch.bfloat16 else scores.dtype).numpy()
    )
    dominated, dominating = np.zeros((2, prompts, candidates), dtype=bool)
    count = max(BLOCK // candidates, 1)

    def compare_rows(where: slice) -> None:
        for start in range(where.start, where.stop, count):
            rows = slice(start, min(start + count, where.stop))
            below, above = _domination(np.ascontiguousarray(values[rows].transpose(2, 1, 0)))
            dominated[rows], dominating[rows] = below.T, above.T

    over_rows(compare_rows, prompts, 4 * count, torch.device("cpu"))
    return torch.from_numpy(~dominated).to(scores.device), torch.from_numpy(~dominating).to(scores.device)


def frontiers(scores: Tensor) -> tuple[Tensor, Tensor]:
    """X+ (F+ without F-) and X- (F- without F+): upper and lower frontier without their intersection.

    (P, N, L) raw scores -> two bool masks (P, N). They do not change under a strictly increasing map of a
    reward. Raises InputError and ValueError as `fronts` does.
    """
    upper, lower = fronts(scores)
    return upper & ~lower, lower & ~upper


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
    _check_finite(scores)
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
def frs(scores: Tensor, calibrated: Tensor, *, lower: str = "frontier") -> PairSets:
    """Frontier-based rejection sampling: winners from the upper frontier, losers from the lower one.

    Args:
        scores: (P, N, L) raw scores, which decide domination (`fronts`).
        calibrated: (P, N, L) calibrated rewards, not used.
        lower: which candidates may lose. `frontier` (figure 2): X+ is F+ without F-, X- is F- without F+.
            `all_dominated` is the paper's other reading ("set of dominated data"): X+ is F+, X- all other
            candidates. It gives dR <= 0 in 9 % of the pairs for independent rewards (4 % at a correlation of
            0.5), `frontier` in 0.7 % (0.06 %).

    Returns:
        Masks (P, N), not filtered by dR.

    Raises:
        InputError: if `lower` is unknown, or a score is not finite.
        ValueError: if the shapes do not match.
    """
    _check_shapes(scores, calibrated)
    if lower not in LOWER_SETS:
        raise ParameterError("lower", lower, f"must be one of {', '.join(LOWER_SETS)}")
    return LOWER_SETS[lower](*fronts(scores))


LOWER_SETS: dict[str, Callable[[Tensor, Tensor], PairSets]] = {
    "frontier": lambda upper, lower: PairSets(upper & ~lower, lower & ~upper),
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


def _domination(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(L, N, C) scores, one prompt per column -> two bool (N, C): dominated by another, dominates another."""
    dominated, dominating = np.zeros((2, *columns.shape[1:]), dtype=bool)
    for offset in range(1, columns.shape[1]):  # each pair of candidates once: i and i + offset
        first, second = columns[:, :-offset], columns[:, offset:]
        first_is_as_good = np.logical_and.reduce(first >= second)
        second_is_as_good = np.logical_and.reduce(second >= first)
        first_dominates = first_is_as_good > second_is_as_good
        second_dominates = second_is_as_good > first_is_as_good
        dominating[:-offset] |= first_dominates
        dominated[offset:] |= first_dominates
        dominating[offset:] |= second_dominates
        dominated[:-offset] |= second_dominates
    return dominated, dominating


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


def _check_finite(scores: Tensor) -> None:
    if scores.is_floating_point() and scores.numel() and not torch.stack(scores.aminmax()).isfinite().all():
        prompt, candidate, reward = (~scores.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"prompt {prompt}, candidate {candidate}, reward {reward}: score "
            f"{scores[prompt, candidate, reward].item()} is not finite; score the candidate again"
        )

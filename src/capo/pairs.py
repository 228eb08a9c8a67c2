"""Scores and calibrated rewards -> who may win and who may lose among a prompt's candidates (CaPO, 4.3).

A *strategy* is a function `(scores, calibrated, *, ...) -> PairSets`; each file of the Hydra group `pairs`
names one. `capo.data.selection` applies a strategy to a whole pool and draws pairs from what it gives.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from capo.errors import InputError
from capo.runtime.threads import over_rows

BLOCK = 2**15  # candidates whose scores are compared at a time, so that the comparisons stay in the L2 cache


class PairSets(NamedTuple):
    """Who may win and who may lose: two bool masks (P, N) over the candidates of each prompt."""

    winners: Tensor
    losers: Tensor


Strategy = Callable[[Tensor, Tensor], PairSets]


def non_dominated(scores: Tensor) -> tuple[Tensor, Tensor]:
    """F+ and F-: the candidates that none dominates, and those that dominate none.

    `a` dominates `b` where all rewards are >= and one at least is >. (Strict Pareto: with the paper's literal
    >= duplicates would dominate each other and F+ would be empty.)

    Args:
        scores: (P, N, L) raw scores. Raw, since win-rates have ties that the scores have not, from
            rounding and from the floor of the log link.

    Returns:
        Two bool masks (P, N).

    Raises:
        InputError: a score that is not finite.
        ValueError: scores without three dimensions, or without candidates or rewards.
    """
    if scores.ndim != 3 or 0 in scores.shape[1:]:
        raise ValueError(f"scores must be (P, N, L) with candidates and rewards; got {tuple(scores.shape)}")
    _check_finite(scores)
    prompts, candidates, _ = scores.shape
    # NumPy, because PyTorch does not vectorize comparisons into bool tensors (four times slower)
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
    """X+ = F+ \\ F- and X- = F- \\ F+: the upper and the lower frontier without what they share.

    (P, N, L) raw scores -> two bool masks (P, N). Unchanged by any strictly increasing map of a reward.
    Raises as `non_dominated` does.
    """
    upper, lower = non_dominated(scores)
    return upper & ~lower, lower & ~upper


def best_worst(scores: Tensor, calibrated: Tensor) -> PairSets:
    """The best candidate wins and the worst loses, by the one reward there is; ties: the lowest index.

    scores, calibrated: (P, N, 1) -> one-hot masks (P, N). Decided on the raw score, as win-rates are rounded.
        Raises InputError for more than one reward or a score that is not finite, ValueError for shapes that
        do not fit.
    """
    _check_shapes(scores, calibrated)
    if scores.shape[-1] != 1:
        raise InputError(
            f"pairs=best_worst orders the candidates by one reward, but {scores.shape[-1]} are selected; "
            f"keep one ('rewards=[NAME]') or take pairs=sum, pairs=frs or pairs=random"
        )
    _check_finite(scores)
    return _extremes(scores[..., 0])


def reward_sum(scores: Tensor, calibrated: Tensor, *, weights: Sequence[float] | None = None) -> PairSets:
    """The highest (weighted) mean over rewards of the calibrated rewards wins, the lowest loses.

    Args:
        scores, calibrated: (P, N, L); the scores are not looked at.
        weights: L weights, none negative and one positive at least; None: equal. dR uses them too.

    Returns:
        One-hot masks (P, N); ties: the lowest index.

    Raises:
        InputError: weights that do not fit the rewards.
        ValueError: shapes that do not fit.
    """
    _check_shapes(scores, calibrated)
    return _extremes(combined_rewards(calibrated, weights))


def frs(scores: Tensor, calibrated: Tensor, *, lower: str = "frontier") -> PairSets:
    """Frontier-based rejection sampling: winners from the upper frontier, losers from the lower one.

    Args:
        scores, calibrated: (P, N, L); domination is decided on the raw scores.
        lower: `frontier`: X+ = F+ \\ F-, X- = F- \\ F+ (figure 2). `all_dominated`, the paper's other reading
            ("set of dominated data"): X+ = F+ and X- = all others, which gives dR <= 0 in 9 % of the pairs
            (independent rewards; 4 % at a correlation of 0.5) instead of 0.7 % (0.06 %).

    Returns:
        Masks (P, N), not filtered by dR.

    Raises:
        InputError: an unknown `lower`, or a score that is not finite.
        ValueError: shapes that do not fit.
    """
    _check_shapes(scores, calibrated)
    if lower not in LOWER_SETS:
        raise InputError(f"pairs=frs: lower={lower!r} is unknown; choose one of {', '.join(LOWER_SETS)}")
    return LOWER_SETS[lower](*non_dominated(scores))


LOWER_SETS: dict[str, Callable[[Tensor, Tensor], PairSets]] = {
    "frontier": lambda upper, lower: PairSets(upper & ~lower, lower & ~upper),
    "all_dominated": lambda upper, lower: PairSets(upper, ~upper),
}


def random_pair(scores: Tensor, calibrated: Tensor) -> PairSets:
    """Any two candidates, ordered by the mean calibrated reward (control).

    (P, N, L) -> masks (P, N), all true twice: only pairs with dR > 0 are drawn, which orders the two. Raises
    ValueError for shapes that do not fit.
    """
    _check_shapes(scores, calibrated)
    everyone = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    return PairSets(everyone, everyone.clone())


def combined_rewards(calibrated: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """R_ca averaged over the rewards (section 4.3); the difference of two candidates is the pair's gap dR.

    Args:
        calibrated: (P, N, L) calibrated rewards.
        weights: L weights, none negative and one positive at least; None: equal.

    Returns:
        (P, N) weighted mean, float32, or float64 where that is given. Equal candidates get equal results.

    Raises:
        InputError: weights that do not fit the rewards.
    """
    rewards = calibrated.shape[-1]
    weights = [1.0] * rewards if weights is None else [float(weight) for weight in weights]
    total = sum(weights)
    if len(weights) != rewards or not (all(weight >= 0 for weight in weights) and 0 < total < math.inf):
        raise InputError(
            f"pairs: weights={weights} must be {rewards} finite numbers, one for each reward in their order, "
            f"none negative and one at least positive"
        )
    dtype = calibrated.dtype if calibrated.dtype == torch.float64 else torch.float32
    mean = torch.zeros(calibrated.shape[:-1], dtype=dtype, device=calibrated.device)
    # multiplication and addition stay apart: where only some elements are fused, ties break
    for reward, weight in zip(calibrated.unbind(-1), weights, strict=True):
        mean += reward.to(dtype) * weight
    return mean / total


def _domination(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(L, N, C) scores, a prompt a column -> bool (N, C) twice: dominated by another, dominating another."""
    dominated, dominating = np.zeros((2, *columns.shape[1:]), dtype=bool)
    for offset in range(1, columns.shape[1]):  # every two candidates once: i and i + offset
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
    """(P, N) rewards -> one-hot masks of the first highest and the first lowest."""
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

"""Pareto fronts of the candidates of a prompt, by their raw scores (CaPO, section 4.3)."""

import numpy as np
import torch
from torch import Tensor

from capo.errors import InputError
from capo.runtime.threads import over_rows

BLOCK = 2**15  # candidates compared at a time, so that the comparisons fit in the L2 cache


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
    check_finite(scores)
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
    return without_common(*fronts(scores))


def without_common(upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """F+ without F-, and F- without F+: masks of any shape."""
    return upper & ~lower, lower & ~upper


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


def check_finite(scores: Tensor) -> None:
    """Raise InputError that names the first of the (P, N, L) scores that is not finite."""
    if scores.is_floating_point() and scores.numel() and not torch.stack(scores.aminmax()).isfinite().all():
        prompt, candidate, reward = (~scores.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"prompt {prompt}, candidate {candidate}, reward {reward}: score "
            f"{scores[prompt, candidate, reward].item()} is not finite; score the candidate again"
        )

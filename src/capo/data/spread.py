"""Spread of a reward's win-rates: whether the reward tells the candidates of a prompt apart at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLAT, SATURATED = 0.05, 0.95  # thresholds, as shares of the largest spread that win-rates can have


@dataclass(frozen=True)
class Spread:
    """Spread of a reward's win-rates over all prompts of a pool.

    Attributes:
        std: standard deviation within a prompt, root mean square over the prompts, in units of the calibrated
            reward.
        flat: share of prompts whose standard deviation is below 5 % of the largest that N win-rates can have,
            so that the reward hardly distinguishes the candidates. NaN where the values are not win-rates
            (`raw`, `zscore`).
        saturated: share of prompts whose standard deviation is above 95 % of that, so that the outcome of
            nearly every comparison is certain. NaN where the values are not win-rates.
    """

    std: float
    flat: float
    saturated: float


def spread(calibrated: Tensor) -> list[Spread]:
    """Spread of each reward's calibrated rewards: (P, N, L) -> L `Spread`s.

    The largest standard deviation that N win-rates can have is that of a ranking in which every comparison is
    certain. Its win-rates are k/(N-1) for k = 0 ... N-1, with standard deviation `sqrt((N+1) / (12 (N-1)))`.
    Raises ValueError for P = 0 or N < 2.
    """
    prompts, candidates = calibrated.shape[:2]
    if prompts == 0 or candidates < 2:
        raise ValueError(
            f"calibrated rewards {tuple(calibrated.shape)} need a prompt and two candidates at least"
        )
    largest = math.sqrt((candidates + 1) / (12 * (candidates - 1)))
    values = calibrated.movedim(-1, 0).float()  # (L, P, N)
    deviation = values.std(-1, correction=0)
    # the win-rates of a prompt have mean 1/2 (within the rounding of bfloat16); raw and z-scores do not
    are_rates = ((values.mean(-1) - 0.5).abs() < 4e-3).all(-1)
    shares = torch.stack([deviation < FLAT * largest, deviation > SATURATED * largest]).float().mean(-1)
    shares = torch.where(are_rates, shares, math.nan)
    std = deviation.square().mean(-1).sqrt()
    return [Spread(*row) for row in torch.cat([std[None], shares]).T.tolist()]


def spread_warnings(spreads: Sequence[Spread], names: Sequence[str], share: float = 0.5) -> list[str]:
    """Warnings on rewards whose win-rates are flat or saturated in more than `share` of the prompts."""
    warnings = []
    for name, found in zip(names, spreads, strict=True):
        if found.flat > share:
            warnings.append(
                f"reward '{name}': the win-rates of {found.flat:.0%} of the prompts are flat (all near 0.5): "
                "it hardly takes part"
            )
        if found.saturated > share:
            warnings.append(
                f"reward '{name}': the win-rates of {found.saturated:.0%} of the prompts are saturated (a "
                f"bare ranking, whatever the distances)"
            )
    return warnings

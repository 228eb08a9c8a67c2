"""Statistics over prompts: intervals, paired tests, prompts that an effect needs, several training seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, norm, permutation_test
from torch import Tensor

LEVEL = 95  # confidence level of intervals, in percent
POWER = 0.8  # chance of finding an effect, for which prompts are counted
FLIPS = 9999  # random choices of signs in a paired test
BLOCK = 2**20  # prompts resampled at a time: 8 MB of indices


def bootstrap_interval(per_prompt: Tensor, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over prompts.

    Prompts are resampled, never comparisons: the K x K comparisons of a prompt are not independent.

    Args:
        per_prompt: (P,) one number per prompt: a win-rate, or a difference.
        seed: seed of the random generator; the same seed gives the same interval.
        resamples: number of resampled means.

    Returns:
        (low, high), the 2.5 % and 97.5 % percentiles.

    Raises:
        ValueError: `per_prompt` is empty, not one-dimensional or not finite, or `resamples` is below 1.
    """
    values = _finite(per_prompt)
    if resamples < 1:
        raise ValueError(f"an interval needs resamples >= 1, got {resamples}")
    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(BLOCK // len(values), 1),
        confidence_level=LEVEL / 100,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The (low, high) between which LEVEL percent of resampled numbers (B,) lie, as many below as above."""
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def crossed_interval(values: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over raters and prompts, both of which are resampled.

    It says how the mean would come out for other raters and other prompts, and errs on the wide side. (Owen,
    "The pigeonhole bootstrap", 2007.) The mean is over prompts, of the mean over the raters of a prompt.

    Args:
        values: (R, P) numbers of R raters on P prompts, NaN where there is none; each prompt has one.
        seed: seed of the random generator; the same seed gives the same interval.
        resamples: number of resampled means; one that leaves a prompt without raters leaves it out.

    Returns:
        (low, high), the 2.5 % and 97.5 % percentiles.

    Raises:
        ValueError: a prompt has no number.
    """
    there = ~np.isnan(values)
    if values.ndim != 2 or not there.size or not there.any(0).all():
        raise ValueError(f"this needs (R, P) numbers, one or more for each prompt; got {values.shape}")
    raters, prompts = values.shape
    random, filled, means = np.random.default_rng(seed), np.where(there, values, 0.0), []
    for start in range(0, resamples, step := max(BLOCK // (raters + prompts), 1)):
        count = min(step, resamples - start)
        # how often each rater and each prompt is drawn
        drawn = random.multinomial(raters, np.full(raters, 1 / raters), count).astype(np.float64)
        times = random.multinomial(prompts, np.full(prompts, 1 / prompts), count)
        seen = drawn @ there
        times = times * (seen > 0)
        kept = times.any(1)
        rates = drawn @ filled / np.maximum(seen, 1)
        means.append((times * rates).sum(1)[kept] / times.sum(1)[kept])
    return percentile_interval(np.concatenate(means))


def balanced_interval(groups: Sequence[Tensor], seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over groups of their means.

    Prompts are resampled within their group, since a benchmark fixes how many each group has.

    Args:
        groups: (P_g,) numbers of the prompts of each group.
        seed: seed of the random generator; the same seed gives the same interval.
        resamples: number of resampled means.

    Returns:
        (low, high), the 2.5 % and 97.5 % percentiles.

    Raises:
        ValueError: there is no group, a group is empty, not one-dimensional or not finite, or `resamples` is
            below 1.
    """
    if not groups or resamples < 1:
        raise ValueError(f"an interval needs groups and resamples >= 1, got {len(groups)} and {resamples}")
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for values in map(_finite, groups):
        step = max(BLOCK // len(values), 1)
        for start in range(0, resamples, step):
            count = min(step, resamples - start)
            drawn = values[rng.integers(len(values), size=(count, len(values)))]
            means[start : start + count] += drawn.mean(1) / len(groups)
    return percentile_interval(means)


def sign_flip_p(differences: Tensor, seed: int) -> float:
    """Two-sided p-value of a mean of paired differences, by a permutation test that flips their signs.

    Under the hypothesis that the two sides do not differ, exchanging them on any prompt is as likely as not.
    With few prompts all choices of signs are tried, else FLIPS random ones, of which the observed one counts
    as one more.

    Args:
        differences: (P,) one difference per prompt; of a win-rate, the rate minus 0.5.
        seed: seed of the random signs; the same seed gives the same p-value.

    Raises:
        ValueError: `differences` is empty, not one-dimensional or not finite.
    """
    values = _finite(differences)
    if len(values) == 1 or not values.any():
        return 1.0  # of one difference, either sign is as far from 0
    found = permutation_test(
        (values,),
        lambda flipped, axis: np.mean(flipped, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(BLOCK // len(values), 1),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values of tests that are read together: name -> p, in the order given.

    The smallest p is multiplied by the number m of tests, the next by m - 1, and so on; none is smaller than
    one before it, or larger than 1. (Holm, "A simple sequentially rejective multiple test procedure", 1979.)
    """
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def paired_tests(differences: Mapping[str, Tensor], seed: int) -> dict[str, dict[str, float]]:
    """Test paired differences that are read together: name -> {"p": `sign_flip_p`, "holm": `holm`}.

    Args:
        differences: name -> (P,), one difference per prompt.
        seed: seed of the random signs.

    Raises:
        ValueError: differences are empty, not one-dimensional or not finite.
    """
    plain = {name: sign_flip_p(values, seed) for name, values in differences.items()}
    adjusted = holm(plain)
    return {name: {"p": p, "holm": adjusted[name]} for name, p in plain.items()}


def prompts_needed(differences: Tensor) -> int | None:
    """Number of prompts at which a mean difference of the size seen would show, in POWER of all cases.

    It is `((z_0.975 + z_POWER) s / mean)^2` for a standard deviation s over prompts, at least 2; None if the
    mean is 0.

    Args:
        differences: (P,) one difference per prompt.

    Raises:
        ValueError: `differences` is empty, not one-dimensional or not finite.
    """
    values = _finite(differences)
    mean = float(values.mean())
    if mean == 0 or len(values) == 1:
        return None
    quantiles = norm.ppf(1 - (1 - LEVEL / 100) / 2) + norm.ppf(POWER)
    return max(2, math.ceil((quantiles * values.std(ddof=1) / mean) ** 2))


@dataclass(frozen=True)
class OverSeeds:
    """Mean over several training seeds of a number per prompt, with the errors due to seeds and to prompts.

    Attributes:
        means: mean over prompts, by seed.
        spread: standard deviation s of `means`.
        error: standard error SE over prompts of the mean over seeds.
    """

    means: tuple[float, ...]
    spread: float
    error: float

    @classmethod
    def of(cls, per_seed: Tensor) -> OverSeeds:
        """From (S, P), one number for each of S >= 2 seeds and P >= 2 prompts; ValueError for fewer."""
        if per_seed.ndim != 2 or min(per_seed.shape) < 2:
            raise ValueError(f"seeds need (S, P) with S, P >= 2; got {tuple(per_seed.shape)}")
        values = per_seed.detach().cpu().double().numpy()
        means, prompts = values.mean(1), values.mean(0)
        return cls(
            tuple(means.tolist()),
            float(means.std(ddof=1)),
            float(prompts.std(ddof=1) / math.sqrt(len(prompts))),
        )

    @property
    def mean(self) -> float:
        """Mean over seeds and prompts."""
        return sum(self.means) / len(self.means)

    @property
    def interval(self) -> tuple[float, float]:
        """`mean -+ 2 sqrt(s^2 / S + SE^2)`: where the mean lies for other seeds and other prompts."""
        half = 2 * math.sqrt(self.spread**2 / len(self.means) + self.error**2)
        return self.mean - half, self.mean + half


def _finite(per_prompt: Tensor) -> np.ndarray:
    values = per_prompt.detach().cpu().double().numpy()
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"this needs (P,) finite numbers, P >= 1; got shape {values.shape}")
    return values

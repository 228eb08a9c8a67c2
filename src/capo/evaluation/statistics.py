"""Bootstrap confidence intervals over prompts."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap
from torch import Tensor

LEVEL = 95  # confidence level of intervals, in percent


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
    values = per_prompt.detach().cpu().double().numpy()
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or resamples < 1:
        raise ValueError(
            f"an interval needs (P,) finite numbers, P >= 1, and resamples >= 1; got shape {values.shape}, "
            f"{resamples} resamples"
        )
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

"""Win-rate of a policy's images against the base's, and its interval (CaPO, B.2)."""

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from capo.errors import InputError

LEVEL = 95  # percent of the bootstrap's resamples that an interval holds
BLOCK = 2**20  # prompts drawn at a time: 8 MB of indices


def win_rate(policy: Tensor, base: Tensor) -> Tensor:
    """Share of the K x K comparisons of a prompt that the policy's images win; a tie counts 1/2.

    (Without the halves a model would have 39 % against itself on discrete scores.)

    Args:
        policy: (P, K) scores of the policy's images, one reward, higher is better.
        base: (P, K') scores of the base's images for the same prompts.

    Returns:
        (P,) win-rate of each prompt in [0, 1]; float64 for float64 scores, else float32.

    Raises:
        InputError: a score that is not finite.
        ValueError: shapes that do not fit.
    """
    if (
        policy.ndim != 2
        or base.ndim != 2
        or len(policy) != len(base)
        or 0 in (policy.shape[1], base.shape[1])
    ):
        raise ValueError(
            f"policy {tuple(policy.shape)} and base {tuple(base.shape)} must be (P, K): a prompt a row"
        )
    for name, scores in {"policy": policy, "base": base}.items():
        bad = (~scores.isfinite()).nonzero()
        if len(bad):
            prompt, image = bad[0].tolist()
            raise InputError(
                f"{name} scores: prompt {prompt}, image {image}: {scores[prompt, image].item()} is no score"
            )
    dtype = torch.float64 if torch.float64 in (policy.dtype, base.dtype) else torch.float32
    ours, theirs = policy[:, :, None], base[:, None, :]
    halves = 2 * (ours > theirs).sum((1, 2)) + (ours == theirs).sum((1, 2))
    return halves.to(dtype) / (2 * policy.shape[1] * base.shape[1])


def bootstrap_interval(per_prompt: Tensor, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of a mean over prompts.

    Prompts are resampled, never comparisons: the K x K comparisons of a prompt are not independent.

    Args:
        per_prompt: (P,) one number a prompt: a win-rate, or a difference.
        seed: of the resampling's own generator; the same seed gives the same interval.
        resamples: number of resampled means.

    Returns:
        (low, high), the 2.5 % and 97.5 % percentiles.

    Raises:
        ValueError: no prompts, a number that is not finite, or no resamples.
    """
    values = per_prompt.detach().cpu().double().numpy()
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or resamples < 1:
        raise ValueError(
            f"an interval needs (P,) finite numbers and a resample; got {values.shape}, {resamples} resamples"
        )
    generator = np.random.default_rng(seed)
    means, block = np.empty(resamples), max(BLOCK // len(values), 1)
    for start in range(0, resamples, block):
        drawn = generator.integers(len(values), size=(min(block, resamples - start), len(values)))
        means[start : start + block] = values[drawn].mean(1)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


class WinRate(Metric):
    """Mean over prompts of `win_rate`; holds two sums, so processes and batches add up to the same."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # float32, since some devices have no other; for K a power of two its sums are exact
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, policy_scores: Tensor, base_scores: Tensor) -> None:
        """Add P prompts: policy_scores (P, K) and base_scores (P, K). Raises as `win_rate` does."""
        rates = win_rate(policy_scores, base_scores)
        self.total += rates.sum().to(self.total.dtype)
        self.prompts += len(rates)

    def compute(self) -> Tensor:
        """Mean win-rate, a scalar; NaN before the first update."""
        return self.total / self.prompts

"""Win-rate of the policy's images against the base's (CaPO, B.2)."""

import torch
from torch import Tensor

from capo.errors import InputError

EVEN = 0.5  # win-rate of the base against itself, in every reward


def win_rate(policy: Tensor, base: Tensor) -> Tensor:
    """Share of a prompt's K x K' comparisons that the policy's images win; a tie counts 1/2.

    (If ties counted 0, a model would get 39 % against itself on discrete scores.)

    Args:
        policy: (P, K) scores of the policy's images by one reward; higher is better.
        base: (P, K') scores of the base's images for the same prompts.

    Returns:
        (P,) win-rate of each prompt, in [0, 1]; float64 for float64 scores, else float32.

    Raises:
        InputError: if a score is not finite.
        ValueError: if the shapes do not match.
    """
    if (
        policy.ndim != 2
        or base.ndim != 2
        or len(policy) != len(base)
        or 0 in (policy.shape[1], base.shape[1])
    ):
        raise ValueError(
            f"policy {tuple(policy.shape)} and base {tuple(base.shape)} must be (P, K), one prompt per row"
        )
    for name, scores in {"policy": policy, "base": base}.items():
        bad = (~scores.isfinite()).nonzero()
        if len(bad):
            prompt, image = bad[0].tolist()
            raise InputError(
                f"{name} scores: prompt {prompt}, image {image}: {scores[prompt, image].item()} is not "
                "finite; score the image again"
            )
    dtype = torch.float64 if torch.float64 in (policy.dtype, base.dtype) else torch.float32
    ours, theirs = policy[:, :, None], base[:, None, :]
    halves = 2 * (ours > theirs).sum((1, 2)) + (ours == theirs).sum((1, 2))
    return halves.to(dtype) / (2 * policy.shape[1] * base.shape[1])

"""Diversity of the images of a prompt, and drift of the policy's images from the base's at equal seeds.

Both are distances: between latents, for every prompt, and between the vectors that the image encoder of one
of the rewards gives of the images, for some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from capo.data.images import Side, latent_diversity, latent_drift
from capo.errors import InputError
from capo.rewards import Reward

SAMPLE = 24  # prompts whose images are encoded, unless it is configured otherwise
AUTO = "auto"  # in place of a reward's name: the first one whose scorer has features
Pictures = Callable[[int], tuple[Sequence[Image], Sequence[Image]]]  # prompt -> images of policy and base


@dataclass(frozen=True)
class Distances:
    """Distances by prompt.

    Attributes:
        policy: (P,) diversity of the policy: mean distance of two of its images.
        base: (P,) that of the base.
        drift: (P,) mean distance of the policy's image from the base's with the same seed.
    """

    policy: Tensor
    base: Tensor
    drift: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, float]]) -> Distances:
        """From the three numbers of each prompt."""
        return cls(*torch.tensor(rows, dtype=torch.float64).T)


def encoder_of(wanted: str | None, rewards: Sequence[Reward]) -> Reward | None:
    """Return the reward whose scorer turns images into vectors: the one named, or the first that can.

    Args:
        wanted: name of a reward; AUTO: the first one that can, None where none can; None: none.
        rewards: the rewards of the evaluation. Their scorers are built.

    Raises:
        InputError: the reward that is named is not there, or has no features.
    """
    if wanted is None:
        return None
    able = [reward for reward in rewards if wanted in (AUTO, reward.name) and reward.has_features]
    if able or wanted == AUTO:
        return next(iter(able), None)
    fault = (
        "its scorer has no method `features` in this process (docs/rewards.md lists the ones that have)"
        if any(reward.name == wanted for reward in rewards)
        else f"no reward of the evaluation has that name ({', '.join(reward.name for reward in rewards)})"
    )
    raise InputError(
        f"evaluation.diversity={wanted}: {fault}; give another one, auto, or null for latents alone"
    )


def sampled_rows(prompts: int, count: int) -> list[int]:
    """Choose at most `count` of `prompts` rows, evenly spaced."""
    count = min(count, prompts)
    return [place * prompts // count for place in range(count)]


def latent_distances(policy: Side, base: Side) -> Distances:
    """Distances of the stored latents, root mean square differences, of all prompts."""
    pairs = zip(policy.drawn.latents(), base.drawn.latents(), strict=True)
    return Distances.of(
        [
            (latent_diversity(ours), latent_diversity(theirs), latent_drift(ours, theirs))
            for ours, theirs in pairs
        ]
    )


def feature_distances(encoder: Reward, pictures: Pictures, rows: Sequence[int]) -> Distances:
    """Cosine distances, 1 - cos, of the encoder's vectors of the images of some prompts.

    The scorer must be on the device that it is to work on.
    """
    found = []
    for row in rows:
        policy, base = pictures(row)
        vectors = unit_vectors(encoder, [*policy, *base])
        ours, theirs = vectors[: len(policy)], vectors[len(policy) :]
        found.append((spread(ours), spread(theirs), cosine_distance(ours, theirs).mean().item()))
    return Distances.of(found)


def unit_vectors(encoder: Reward, images: Sequence[Image]) -> Tensor:
    """Vectors (B, D) of length 1, float64; equal images are encoded once, and have equal vectors."""
    contents = [(image.size, image.tobytes()) for image in images]
    unequal = dict(zip(contents, images, strict=True))
    places = {content: place for place, content in enumerate(unequal)}
    vectors = F.normalize(encoder.features(list(unequal.values())).double(), dim=-1)
    return vectors[[places[content] for content in contents]]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cos of vectors (..., D) of length 1, as half the squared distance: exactly 0 where equal."""
    return 0.5 * (a - b).square().sum(-1)


def spread(vectors: Tensor) -> float:
    """Mean cosine distance of (K, D) vectors of length 1, over all pairs of them."""
    one, other = torch.triu_indices(len(vectors), len(vectors), 1)
    return cosine_distance(vectors[one], vectors[other]).mean().item()

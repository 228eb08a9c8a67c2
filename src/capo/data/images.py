"""Generated images of policy or base, read back from their pool: scores, latents, decoded images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.pool import Pool, PoolReader
from capo.rewards import Reward

Scores = Mapping[str, Tensor]  # reward or measure -> (P, K)


def latent_diversity(latents: Tensor) -> float:
    """Mean distance of the latents (K, C, H, W) of one prompt, over all pairs of them.

    The distance is the root mean square difference, which does not grow with the size of the latents: sqrt(2)
    for two independent latents of unit variance, 0 for copies.
    """
    flat = latents.flatten(1).double()
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


def latent_drift(policy: Tensor, base: Tensor) -> float:
    """Mean distance of policy's and base's latents (K, C, H, W) of one prompt, at equal seeds.

    The distance is that of `latent_diversity`.
    """
    return (policy.double() - base.double()).flatten(1).square().mean(1).sqrt().mean().item()


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its images, their scores and, with an oracle, the oracle's measures."""

    drawn: "GeneratedImages"
    scores: Scores
    measures: Scores


@dataclass(frozen=True)
class GeneratedImages:
    """Images of a spec in their pool, complete and scored."""

    spec: PoolSpec
    generator: ImageGenerator
    pool: Pool

    @classmethod
    def fill(
        cls, spec: PoolSpec, generator: ImageGenerator, rewards: Sequence[Reward], progress: bool
    ) -> "GeneratedImages":
        """Generate and score the images that are missing; see `fill_pool`."""
        return cls(spec, generator, fill_pool(spec, generator, rewards, progress=progress))

    @property
    def positions(self) -> list[int]:
        """Position of each prompt of the spec in the pool, in the spec's order."""
        return self.pool.positions(self.spec.prompts)

    def scores(self, rewards: Sequence[Reward]) -> dict[str, Tensor]:
        """Raw scores: name of the reward -> (P, K)."""
        scores = self.pool.scores([reward.key for reward in rewards], self.spec.candidates, self.positions)
        return {reward.name: scores[..., number] for number, reward in enumerate(rewards)}

    def side(self, rewards: Sequence[Reward], oracle: Sequence[Reward]) -> Side:
        """Side of a comparison, from stored scores of `rewards` and `oracle` (which may be empty)."""
        return Side(self, self.scores(rewards), self.scores(oracle) if oracle else {})

    def latents(self) -> Iterator[Tensor]:
        """Yield the stored latents (K, C, H, W) of each prompt of the spec."""
        reader, candidates = PoolReader(self.pool), range(self.spec.candidates)
        return (reader.latents(place, candidates) for place in self.positions)

    def images(self, prompt: int) -> list[Image]:
        """Decoded images, K, of prompt number `prompt` of the spec."""
        latents = PoolReader(self.pool).latents(self.positions[prompt], range(self.spec.candidates))
        return self.generator.backbone.decode(latents, self.generator.settings.decoded)

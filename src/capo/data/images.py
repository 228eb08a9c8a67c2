"""The images of policy or base in their pool, read back: scores, distances, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.pool import Pool, PoolReader
from capo.rewards import Reward

Scores = Mapping[str, Tensor]  # reward or measure -> (P, K)


def latent_diversity(latents: Tensor) -> float:
    """Mean distance between two latents (K, C, H, W) of one prompt, over all pairs.

    The distance is the root mean square difference, so that it does not grow with the size of the latents:
    sqrt(2) for two independent latents of unit variance, 0 for copies.
    """
    flat = latents.flatten(1).double()
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its images, their scores and, where there is an oracle, what it measured."""

    drawn: "GeneratedImages"
    scores: Scores
    measures: Scores


@dataclass(frozen=True)
class GeneratedImages:
    """The images of a spec, in their pool: scored, and complete."""

    spec: PoolSpec
    generator: ImageGenerator
    pool: Pool

    @classmethod
    def fill(
        cls, spec: PoolSpec, generator: ImageGenerator, rewards: Sequence[Reward], progress: bool
    ) -> "GeneratedImages":
        """Makes what is missing of them."""
        return cls(spec, generator, fill_pool(spec, generator, rewards, progress=progress))

    @property
    def positions(self) -> list[int]:
        return self.pool.positions(self.spec.prompts)

    def scores(self, rewards: Sequence[Reward]) -> dict[str, Tensor]:
        """Reward -> (P, K) raw scores."""
        scores = self.pool.scores([reward.key for reward in rewards], self.spec.candidates, self.positions)
        return {reward.name: scores[..., number] for number, reward in enumerate(rewards)}

    def side(self, rewards: Sequence[Reward], oracle: Sequence[Reward]) -> Side:
        """What is known of the images, which both have scored."""
        return Side(self, self.scores(rewards), self.scores(oracle) if oracle else {})

    def diversity(self) -> float:
        """`latent_diversity`, mean over the prompts."""
        reader, candidates = PoolReader(self.pool), range(self.spec.candidates)
        distances = [latent_diversity(reader.latents(place, candidates)) for place in self.positions]
        return sum(distances) / len(distances)

    def images(self, prompt: int) -> list[Image]:
        """The K images of the spec's prompt number `prompt`."""
        latents = PoolReader(self.pool).latents(self.positions[prompt], range(self.spec.candidates))
        return self.generator.backbone.decode(latents, self.generator.settings.decoded)

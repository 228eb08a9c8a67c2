"""The images of policy or base in their pool, read back: scores, distances, measures, pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from capo.errors import InputError
from capo.generation import ImageGenerator, PoolPlan, fill_pool, pool_images
from capo.pool import Pool, PoolReader
from capo.rewards import Reward

# images, prompts -> measure -> (B,)
Oracle = Callable[[Sequence[Image], Sequence[str]], Mapping[str, Tensor]]
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
    """One side of a comparison: its images, their scores and, where there is an oracle, its measures."""

    drawn: "Drawn"
    scores: Scores
    measures: Scores | None


@dataclass(frozen=True)
class Drawn:
    """The images of a plan, in their pool: scored, and complete."""

    plan: PoolPlan
    generator: ImageGenerator
    pool: Pool

    @classmethod
    def fill(
        cls, plan: PoolPlan, generator: ImageGenerator, rewards: Sequence[Reward], progress: bool
    ) -> "Drawn":
        """Makes what is missing of them."""
        return cls(plan, generator, fill_pool(plan, generator, rewards, progress=progress))

    @property
    def positions(self) -> list[int]:
        return self.pool.positions(self.plan.prompts)

    def scores(self, rewards: Sequence[Reward]) -> dict[str, Tensor]:
        """reward -> (P, K) raw scores."""
        scores = self.pool.scores([reward.key for reward in rewards], self.plan.candidates, self.positions)
        return {reward.name: scores[..., number] for number, reward in enumerate(rewards)}

    def side(self, rewards: Sequence[Reward], oracle: Oracle | None, label: str, progress: bool) -> Side:
        """What is known of the images; `label` is for the progress bar."""
        measures = None if oracle is None else self.measures(oracle, label, progress)
        return Side(self, self.scores(rewards), measures)

    def diversity(self) -> float:
        """`latent_diversity`, mean over the prompts."""
        reader, candidates = PoolReader(self.pool), range(self.plan.candidates)
        distances = [latent_diversity(reader.latents(place, candidates)) for place in self.positions]
        return sum(distances) / len(distances)

    def images(self, prompt: int) -> list[Image]:
        """The K images of the plan's prompt number `prompt`."""
        latents = PoolReader(self.pool).latents(self.positions[prompt], range(self.plan.candidates))
        return self.generator.backbone.decode(latents)

    def measures(self, oracle: Oracle, label: str, progress: bool) -> dict[str, Tensor]:
        """measure -> (P, K), from the images that the rewards have scored."""
        found: dict[int, list[dict[str, Tensor]]] = {place: [] for place in self.positions}
        texts = {place: prompt.text for prompt, place in self.pool.prompts}
        total, desc = len(found) * self.plan.candidates, f"oracle of {label}"
        with tqdm(total=total, desc=desc, unit="image", disable=not progress, dynamic_ncols=True) as bar:
            for shard in self.pool.shards(self.plan.candidates, self.positions):
                rows = pool_images(self.pool, self.generator.backbone, shard, self.generator.settings.batch)
                for place, images in zip(shard.positions, rows, strict=True):
                    if place in found:
                        found[place].append(_asked(oracle, images, texts[place]))
                        bar.update(len(images))
        return {name: self._gathered(found, name) for name in next(iter(found.values()))[0]}

    def _gathered(self, found: Mapping[int, Sequence[Mapping[str, Tensor]]], name: str) -> Tensor:
        rows = [torch.cat([block[name] for block in found[place]]) for place in self.positions]
        return torch.stack([row[: self.plan.candidates] for row in rows]).float()


def _asked(oracle: Oracle, images: Sequence[Image], prompt: str) -> dict[str, Tensor]:
    try:
        return dict(oracle(images, [prompt] * len(images)))
    except InputError as error:
        raise InputError(
            f'{error}; the oracle was asked about prompt "{prompt}": '
            "evaluation.oracle=null leaves it out, the images that are made stay"
        ) from error

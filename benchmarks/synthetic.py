"""Pools of random latents, texts and scores, written by the pool's own functions: no image is drawn for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, open_pool
from capo.data.pool import Pool, Shard
from capo.data.prompts import Prompt, make_prompt
from capo.rewards import Reward

SETTINGS = {"made by": "benchmarks/synthetic.py"}


class Numbers:
    """Stands for a backbone: all that a pool asks of a model, and random numbers in place of text embeddings.

    latent_shape: (C, H, W). text_shapes: name -> shape of one prompt's tensor, float32.
    """

    def __init__(self, latent_shape: Sequence[int], text_shapes: Mapping[str, Sequence[int]]):
        self.latent_shape, self.text_shapes = tuple(latent_shape), dict(text_shapes)
        self.fingerprints = dict.fromkeys(("denoiser", "latent_space", "text_encoders"), "0" * 64)
        self.device = torch.device("cpu")

    def sampler_identity(self) -> dict[str, object]:
        """The latent's shape: pools of other shapes are other pools."""
        return {"latent_shape": list(self.latent_shape)}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each (B, *shape), standard normal."""
        return {name: torch.randn(len(prompts), *shape) for name, shape in self.text_shapes.items()}


def numbers_generator(
    latent_shape: Sequence[int], text_shapes: Mapping[str, Sequence[int]]
) -> ImageGenerator:
    """What a plan is filled with where no model is wanted."""
    settings = SamplerSettings(steps=1, guidance=1.0, batch=16)
    return ImageGenerator(Numbers(latent_shape, text_shapes), nn.Identity(), "0" * 64, settings)


def numbers_plan(root: Path, prompts: Sequence[Prompt], candidates: int, prompts_per_shard: int) -> PoolSpec:
    """A plan for a pool of `numbers_generator`."""
    return PoolSpec(Path(root), "numbers", "train", 0, prompts, candidates, prompts_per_shard)


def numbered_prompts(count: int) -> list[Prompt]:
    """`count` different prompts of about the length of a real one."""
    scene = "a red circle above a blue square on a gray background"
    return [make_prompt(f"prompt number {number}: {scene}") for number in range(count)]


def synthetic_rewards(count: int) -> list[Reward]:
    """Rewards without a scorer, every second one a probability."""
    return [
        Reward(f"reward{number}", {}, link="log" if number % 2 else "identity") for number in range(count)
    ]


def synthetic_pool(plan: PoolSpec, generator: ImageGenerator, rewards: Sequence[Reward]) -> Pool:
    """The plan's pool, complete; what is there already stays.

    Texts are the generator's; latents and scores are standard normal, sigmoids of such where the link is log.
    """
    pool = open_pool(plan, generator)
    for row in pool.text_shards(pool.positions(plan.prompts)):
        torch.manual_seed(row)
        if not pool.has_text(row):
            texts = [prompt.text for prompt in pool.row_prompts(row)]
            pool.write_text(row, generator.backbone.encode_prompts(texts), SETTINGS)
        for shard in pool.row_shards(row, plan.candidates):
            _write_shard(pool, shard, generator.backbone.latent_shape, rewards)
    return pool


def _write_shard(pool: Pool, shard: Shard, latent_shape: Sequence[int], rewards: Sequence[Reward]) -> None:
    size = len(shard.positions), len(shard.candidates)
    if not pool.has_latents(shard):
        pool.write_latents(shard, torch.randn(*size, *latent_shape), SETTINGS)
    for reward in rewards:
        if not pool.has_scores(reward.key, shard):
            scores = torch.randn(size)
            pool.write_scores(
                reward.key, shard, scores.sigmoid() if reward.link == "log" else scores, SETTINGS
            )

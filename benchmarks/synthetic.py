"""Pools of random latents, text and scores, written with functions of `capo.data.pool`, without a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, open_pool
from capo.data.pool import Pool, Shard
from capo.data.prompts import Prompt, make_prompt
from capo.rewards import Reward

SETTINGS = {"made by": "benchmarks/synthetic.py"}


class Numbers:
    """Stand-in for a backbone, with all that a pool needs of a model, and random text embeddings.

    Args:
        latent_shape: (C, H, W).
        text_shapes: name -> shape of one prompt's float32 text tensor.
    """

    def __init__(self, latent_shape: Sequence[int], text_shapes: Mapping[str, Sequence[int]]):
        self.latent_shape, self.text_shapes = tuple(latent_shape), dict(text_shapes)
        self.fingerprints = dict.fromkeys(("denoiser", "latent_space", "text_encoders"), "0" * 64)
        self.device = torch.device("cpu")

    def sampler_identity(self) -> dict[str, object]:
        """Shape of the latents, so that pools of different shapes have different fingerprints."""
        return {"latent_shape": list(self.latent_shape)}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Standard normal text tensors (B, *shape) by name."""
        return {name: torch.randn(len(prompts), *shape) for name, shape in self.text_shapes.items()}


def numbers_generator(
    latent_shape: Sequence[int], text_shapes: Mapping[str, Sequence[int]]
) -> ImageGenerator:
    """Generator of a pool without a model."""
    settings = SamplerSettings(steps=1, guidance=1.0, batch=16)
    numbers: Any = Numbers(latent_shape, text_shapes)  # what a pool asks of a backbone, and nothing else
    return ImageGenerator(numbers, nn.Identity(), "0" * 64, settings)


def numbers_plan(root: Path, prompts: Sequence[Prompt], candidates: int, prompts_per_shard: int) -> PoolSpec:
    """Specification of a pool for `numbers_generator`."""
    return PoolSpec(Path(root), "numbers", "train", 0, prompts, candidates, prompts_per_shard)


def numbered_prompts(count: int) -> list[Prompt]:
    """Distinct prompts, `count` of them, about as long as real ones."""
    scene = "a red circle above a blue square on a gray background"
    return [make_prompt(f"prompt number {number}: {scene}") for number in range(count)]


def synthetic_rewards(count: int) -> list[Reward]:
    """Rewards without a scorer; every second one is a probability."""
    return [
        Reward(f"reward{number}", {}, link="log" if number % 2 else "identity") for number in range(count)
    ]


def synthetic_pool(plan: PoolSpec, generator: ImageGenerator, rewards: Sequence[Reward]) -> Pool:
    """Complete the pool of a specification with random numbers, keeping existing files.

    Text comes from the generator. Latents and scores are standard normal; for the link `log`, scores are the
    sigmoid of that.
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

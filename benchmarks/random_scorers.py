"""Scorers for benchmarks: a CLIP image tower with random weights, and one that another process runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SIDE = 224  # of the tower's images
# The other process needs Pillow alone, so torch is imported where the tower is made.


def levels(images: Sequence, prompts: Sequence[str]) -> list[float]:
    """Mean level of each image's pixels, which reads all of them and computes next to nothing."""
    from PIL import ImageStat

    return [sum(ImageStat.Stat(image).mean) for image in images]


def tower(size: str):
    """A scorer of the cost of PickScore's image tower (ViT-H/14; tiny: two narrow layers), random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from capo.rewards.clip_scores import BatchScorer
    from capo.rewards.cropping import cropped

    full: dict[str, Any] = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    }
    tiny: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPVisionConfig(patch_size=14, image_size=SIDE, **(full if size == "full" else tiny))

    class Tower(BatchScorer):
        """The mean of the projection of each image."""

        def _batch(self, images, prompts):
            pixels = torch.stack([cropped(image, SIDE) for image in images])
            return self.module(pixel_values=pixels.to(self.device)).image_embeds.mean(-1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tower(CLIPVisionModelWithProjection(config))

"""Two ways to draw the same images: calls of the plain pipeline, and the steps of a pool without the pool."""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings, candidate_generators, sample_prompts
from capo.data.prompts import Prompt, candidate_seed
from capo.runtime.threads import map_batches

SEED = 0


def seeds_of(prompt: Prompt, count: int) -> list[int]:
    """The seeds of a pool's candidates."""
    return [candidate_seed(SEED, prompt.id, index) for index in range(count)]


def plain_pipeline(backbone: Backbone, prompts: Sequence[Prompt], settings: SamplerSettings) -> list[Image]:
    """A call of the pipeline for each prompt."""
    images: list[Image] = []
    pipeline: Any = backbone.pipeline  # the class of all pipelines has no call
    for prompt in prompts:
        images += pipeline(
            [prompt.text] * settings.batch,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=candidate_generators(seeds_of(prompt, settings.batch)),
        ).images
    return images


def our_sampling(backbone: Backbone, prompts: Sequence[Prompt], settings: SamplerSettings) -> list[Image]:
    """Text, latents and decoding as a pool's stages do them, without the pool."""
    text = backbone.encode_prompts([prompt.text for prompt in prompts])
    seeds = [seeds_of(prompt, settings.batch) for prompt in prompts]
    latents = sample_prompts(backbone, backbone.denoiser, text, seeds, settings).flatten(0, 1)
    parts = latents.split(settings.batch)
    decoded = map_batches(
        lambda part: backbone.decode(part, settings.batch), parts, settings.parallel, backbone.device
    )
    return [image for images in decoded for image in images]

"""The base model `shapes_mmdit`: SD3's classes and conditioning at the size of the shapes world, without a T5."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from capo.noise import flow_add_noise
from capo.shapes.make import flow_autoencoder
from capo.shapes.make.cells import Teller, all_things
from capo.shapes.make.fitting import fit, generator, share
from capo.shapes.make.text import encoders, tokenizer

ACROSS = ((1, 0), (-1, 0), (0, 1), (0, -1))  # neighbours, as tokens to the right and down
LOOKS = (
    ACROSS,
    ((1, 1), (-1, -1), (-1, 1), (1, -1)),
    ((2, 0), (-2, 0), (0, 2), (0, -2)),
    ACROSS,
)  # block by block, at the start
SHARPNESS = 2.5  # of that look: half of the attention lies on the neighbour meant
SHIFT = 3.0  # of the sampler's times, as SD3's
CONTEXT = (
    128  # width of the text tokens, the two encoders' 32 + 64 padded with zeros as SD3's are to T5's width
)
TOLD_AFTER = 1  # the block, counted from 0, whose tokens the teller reads
TELLING = 0.2  # weight of what it is asked
T5_TOKENS = 4  # zeros in the place of the T5's: the pipeline's `max_sequence_length`


def build_transformer() -> SD3Transformer2DModel:
    """A fresh denoiser: 64 tokens, one a latent, four joint blocks."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=flow_autoencoder.CHANNELS,
        out_channels=flow_autoencoder.CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=8,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=8,  # as many as there are latents: with more of them neighbours are told apart too little
    )


def prepare(transformer: SD3Transformer2DModel) -> None:
    """Fresh weights of a denoiser that learns faster than diffusers' own do, which leave every gate open.

    What modulates and the last projection begin at zero, as DiT's do, all other linear maps as Xavier's. In each block four of
    the heads of the picture's queries begin by looking at one neighbour each, as a convolution does (`LOOKS`).
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            shut = (
                name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
                or name == "proj_out"
            )
            nn.init.zeros_(module.weight) if shut else nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(transformer.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(transformer.pos_embed.proj.bias)
    read = position_reader(transformer.pos_embed.pos_embed[0])
    width = transformer.config.attention_head_dim
    for block, offsets in zip(transformer.transformer_blocks, LOOKS, strict=True):
        for head, (right, down) in enumerate(offsets):
            rows = slice(head * width, (head + 1) * width)
            block.attn.to_q.weight.data[rows] = SHARPNESS * read(0, 0, width)
            block.attn.to_k.weight.data[rows] = SHARPNESS * read(right, down, width)


def position_reader(places: Tensor) -> Callable[[int, int, int], Tensor]:
    """How linear maps tell places from normalised tokens: places (P, C) are the embeddings of a square of tokens.

    The function that comes back gives, for an offset and W features, the map (W, C) whose inner product with that of no offset
    is largest where the second token lies `right` and `down` of the first: sines and cosines of the shifted place, fitted by
    least squares through the layer norm and some noise in the place of what latents hold.
    """
    draw, side = generator(0, 4), round(len(places) ** 0.5)
    tokens = F.layer_norm(
        places + 0.3 * torch.randn(200, *places.shape, generator=draw), places.shape[-1:]
    ).flatten(0, 1)
    squares = tokens.T @ tokens + 1e-3 * len(tokens) * torch.eye(places.shape[-1])
    down, right = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")

    def read(to_right: int, to_bottom: int, features: int) -> Tensor:
        rates = 10_000 ** -(
            torch.arange(features // 4) * 4 / places.shape[-1]
        )  # the fastest of the embedding's own
        turns = [
            (axis.flatten()[:, None] - offset) * rates
            for axis, offset in ((right, to_right), (down, to_bottom))
        ]
        told = torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], dim=1)
        return torch.linalg.solve(squares, tokens.T @ told.repeat(200, 1)).T

    return read


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's own."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class Learner(nn.Module):
    """A denoiser to be trained, and the text encoders of `shapes_unet`, which stay as they are.

    Args:
        unet: folder of the pipeline `shapes_unet`.
    """

    def __init__(self, unet: Path) -> None:
        super().__init__()
        self.tokenizer = tokenizer()
        self.transformer = build_transformer()
        self.teller = Teller(self.transformer.inner_dim)
        self.transformer.transformer_blocks[TOLD_AFTER].register_forward_hook(self._keep)
        plain, self.second = encoders(len(self.tokenizer))
        self.first = CLIPTextModelWithProjection(plain.config)
        for module, part in ((self.first, "text_encoder"), (self.second, "text_encoder_2")):
            state = CLIPTextModelWithProjection.from_pretrained(unet / part, dtype=torch.float32).state_dict()
            module.load_state_dict(state)
            module.requires_grad_(False)

    def _keep(self, block: nn.Module, given: tuple, tokens: tuple[Tensor, Tensor]) -> None:
        self.seen = tokens[1]  # (B, 64, width), the picture's

    def tokens(self, captions: list[str]) -> Tensor:
        """(B, LENGTH) token ids."""
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def conditioning(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, LENGTH + T5_TOKENS, CONTEXT) and pooled text (B, 128) for token ids (B, LENGTH), as the pipeline's."""
        told = [encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second)]
        words = torch.cat([output.hidden_states[-2] for output in told], dim=-1)
        words = F.pad(words, (0, CONTEXT - words.shape[-1], 0, T5_TOKENS))
        return words, torch.cat([output.text_embeds for output in told], dim=-1)


def train(
    work: Path, unet: Path, steps: int, batch: int = 32, seed: int = 0, start: Path | None = None
) -> StableDiffusion3Pipeline:
    """Fit the velocity on the encoded scenes in `work`; captions are dropped (the empty one) in one of ten.

    What the tokens are asked beside it (`cells`) is not shipped.

    Args:
        start: state of an earlier run (`mmdit.pt`) whose averaged weights are where this one starts.
    """
    torch.manual_seed(seed)
    vae = flow_autoencoder.load(work)
    latents = flow_autoencoder.encode_all(work, vae)
    things = all_things(work, len(latents), seed, len(os.sched_getaffinity(0)))
    learner = Learner(unet)
    prepare(learner.transformer)
    if start:
        learner.load_state_dict(torch.load(start, weights_only=True)["average"], strict=False)
    ids = learner.tokens(json.loads((work / "captions.json").read_text()))
    nothing = learner.tokens([""])

    def loss(step: int):
        draw, mine = generator(seed, 3, step), share(batch)
        rows = torch.randint(len(latents), (batch,), generator=draw)[mine]
        x = torch.from_numpy(latents[rows.numpy()])
        t = times(batch, draw)[mine]
        noise = torch.randn(batch, *x.shape[1:], generator=draw)[mine]
        drop = (torch.rand(batch, generator=draw) < 0.1)[mine]
        with torch.no_grad():
            words, pooled = learner.conditioning(torch.where(drop[:, None], nothing, ids[rows]))
        told = learner.transformer(flow_add_noise(x, noise, t), words, pooled, 1000 * t).sample
        errors = (told - (noise - x)).square().mean((1, 2, 3))
        telling = learner.teller.loss(learner.seen, things[rows])
        return errors.mean() + TELLING * telling, {
            "velocity": errors.mean().item(),
            "telling": telling.item(),
        }

    matrices = [weight for weight in learner.transformer.transformer_blocks.parameters() if weight.ndim == 2]
    fit("mmdit", learner, loss, work, steps, lr=2e-3, average=True, matrices=matrices)
    return pipeline(learner, vae)


def times(batch: int, draw: torch.Generator) -> Tensor:
    """(batch,) times in (0, 1), stratified, in random order: a quarter uniform, the others logit-normal around 0.25."""
    u = (torch.rand(batch, generator=draw) + torch.arange(batch)) / batch
    u = u[torch.randperm(batch, generator=draw)].clamp(1e-4, 1 - 1e-4)
    return torch.where(torch.arange(batch) % 4 == 0, u, torch.sigmoid(0.25 + torch.special.ndtri(u)))


def pipeline(learner: Learner, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The whole pipeline of a trained learner and its autoencoder."""
    return StableDiffusion3Pipeline(
        transformer=learner.transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=learner.first,
        tokenizer=learner.tokenizer,
        text_encoder_2=learner.second,
        tokenizer_2=learner.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )

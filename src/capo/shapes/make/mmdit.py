"""Base model `shapes_mmdit`: SD3's classes and conditioning at the size of the shapes world, without a T5."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from capo.backbones.models import Autoencoder
from capo.noise import flow_add_noise
from capo.shapes.make import flow_autoencoder
from capo.shapes.make.cells import Teller, all_things
from capo.shapes.make.fitting import fit, generator, share, stratified
from capo.shapes.make.text import encoders, token_ids, tokenizer

ACROSS = ((1, 0), (-1, 0), (0, 1), (0, -1))  # neighbors, as tokens to the right and down
# offsets that the heads of each block attend to at first
LOOKS = (ACROSS, ((1, 1), (-1, -1), (-1, 1), (1, -1)), ((2, 0), (-2, 0), (0, 2), (0, -2)), ACROSS)
SHARPNESS = 2.5  # of that attention: about half of it is on the intended neighbor
SHIFT = 3.0  # of the sampler's times, as in SD3
CONTEXT = 128  # width of the text tokens: the encoders' 32 + 64, zero-padded as SD3 pads to T5's width
TOLD_AFTER = 1  # block, counted from 0, whose tokens the auxiliary head reads
TELLING = 0.2  # weight of the auxiliary loss
T5_TOKENS = 4  # zeros in place of the T5's tokens: the pipeline's `max_sequence_length`


def build_transformer() -> SD3Transformer2DModel:
    """Build an untrained denoiser: 64 tokens, one for each latent, and four joint blocks."""
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
        pos_embed_max_size=8,  # one per latent: in a larger grid, embeddings of neighbors differ too little
    )


def prepare(transformer: SD3Transformer2DModel) -> None:
    """Initialize a denoiser in place, to train faster than from diffusers' weights, whose gates are open.

    Modulations and the last projection are zero, as in DiT; all other linear maps are Xavier-uniform. In each
    block, four heads of the picture's queries attend to one neighbor each at first, as a convolution does
    (`LOOKS`).
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            shut = (
                name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
                or name == "proj_out"
            )
            nn.init.zeros_(module.weight) if shut else nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embedding, blocks = cast(Any, transformer.pos_embed), cast(Any, transformer.transformer_blocks)
    nn.init.xavier_uniform_(embedding.proj.weight.flatten(1))
    nn.init.zeros_(embedding.proj.bias)
    read = position_reader(embedding.pos_embed[0])
    width = transformer.config["attention_head_dim"]
    for block, offsets in zip(blocks, LOOKS, strict=True):
        for head, (right, down) in enumerate(offsets):
            rows = slice(head * width, (head + 1) * width)
            block.attn.to_q.weight.data[rows] = SHARPNESS * read(0, 0, width)
            block.attn.to_k.weight.data[rows] = SHARPNESS * read(right, down, width)


def position_reader(places: Tensor) -> Callable[[int, int, int], Tensor]:
    """Fit linear maps that read positions from layer-normalized tokens.

    `places` (P, C) are the position embeddings of a square of tokens. The function returned gives, for an
    offset and W features, a map (W, C) whose inner product with that of offset zero is largest where the
    second token is `right` and `down` of the first: sines and cosines of the shifted position, fitted by
    least squares through the layer norm, with noise in place of the latents' content.
    """
    draw, side = generator(0, 4), round(len(places) ** 0.5)
    tokens = F.layer_norm(
        places + 0.3 * torch.randn(200, *places.shape, generator=draw), places.shape[-1:]
    ).flatten(0, 1)
    squares = tokens.T @ tokens + 1e-3 * len(tokens) * torch.eye(places.shape[-1])
    down, right = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")

    def read(to_right: int, to_bottom: int, features: int) -> Tensor:
        # the embedding's highest frequencies
        rates = 10_000 ** -(torch.arange(features // 4) * 4 / places.shape[-1])
        turns = [
            (axis.flatten()[:, None] - offset) * rates
            for axis, offset in ((right, to_right), (down, to_bottom))
        ]
        told = torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], dim=1)
        return torch.linalg.solve(squares, tokens.T @ told.repeat(200, 1)).T

    return read


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build SD3's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class Learner(nn.Module):
    """Denoiser to be trained, and the frozen text encoders of `shapes_unet`.

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
        self.seen = tokens[1]  # the picture's tokens (B, 64, width)

    def conditioning(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pipeline's conditioning for token ids (B, LENGTH), as `conditioning` does."""
        return conditioning(ids, (self.first, self.second))


def conditioning(ids: Tensor, by: Sequence[CLIPTextModelWithProjection]) -> tuple[Tensor, Tensor]:
    """Return what SD3's pipeline gives the denoiser for token ids (B, LENGTH), encoded by two encoders.

    Returns:
        Text states (B, LENGTH + T5_TOKENS, CONTEXT) and pooled text (B, 128).
    """
    told = [encoder(ids, output_hidden_states=True) for encoder in by]
    words = torch.cat([output.hidden_states[-2] for output in told], dim=-1)
    words = F.pad(words, (0, CONTEXT - words.shape[-1], 0, T5_TOKENS))
    return words, torch.cat([output.text_embeds for output in told], dim=-1)


@torch.no_grad()
def begin(learner: Learner, folder: Path, captions: list[str]) -> None:
    """Give the learner the transformer of a pipeline in `folder`, which may have other text encoders.

    Its two maps of text are refitted by least squares, so that they make of the learner's encodings of
    `captions` what they made of the pipeline's own. Each word must be one token of both.
    """
    transformer = learner.transformer
    transformer.load_state_dict(SD3Transformer2DModel.from_pretrained(folder / "transformer").state_dict())
    own = [
        CLIPTextModelWithProjection.from_pretrained(folder / part, dtype=torch.float32)
        for part in ("text_encoder", "text_encoder_2")
    ]
    # that of `shapes_unet` has none
    learner.first.text_projection.load_state_dict(own[0].text_projection.state_dict())
    before = token_ids(CLIPTokenizer.from_pretrained(folder / "tokenizer"), captions)
    after = token_ids(learner.tokenizer, captions)
    maps = transformer.context_embedder, cast(Any, transformer.time_text_embed).text_embedder.linear_1
    for layer, old, new in zip(maps, conditioning(before, own), learner.conditioning(after), strict=True):
        refit(layer, old.flatten(0, -2), new.flatten(0, -2))


def refit(layer: nn.Linear, old: Tensor, new: Tensor) -> None:
    """Change a linear layer, in place, so that rows `new` (N, C) give what rows `old` (N, C) gave."""
    rows = F.pad(new.double(), (0, 1), value=1.0)
    squares = rows.T @ rows
    squares += 1e-6 * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    solved = torch.linalg.solve(squares, rows.T @ layer(old).double())
    layer.weight.copy_(solved[:-1].T)
    layer.bias.copy_(solved[-1])


def train(
    work: Path, unet: Path, steps: int, batch: int = 32, seed: int = 0, start: Path | None = None
) -> StableDiffusion3Pipeline:
    """Train velocity prediction on the encoded scenes in `work`; one in ten captions is replaced by "".

    The head of the auxiliary task (`cells`) is not saved with the pipeline.

    Args:
        work: folder of scenes, captions, logs and checkpoints.
        unet: folder of the pipeline `shapes_unet`.
        steps: training steps.
        batch: scenes per step.
        seed: of weights, batches and noise.
        start: initial weights: a checkpoint of another run (`mmdit.pt`), whose averaged weights are taken,
            or the folder of a pipeline of the same shape.
    """
    torch.manual_seed(seed)
    vae = flow_autoencoder.load(work)
    latents = flow_autoencoder.encode_all(work, vae)
    things = all_things(work, len(latents), seed, len(os.sched_getaffinity(0)))
    learner = Learner(unet)
    prepare(learner.transformer)
    captions = json.loads((work / "captions.json").read_text())
    if start and start.is_dir():
        begin(learner, start, [*sorted(set(captions)), ""])
    elif start:
        learner.load_state_dict(torch.load(start, weights_only=True)["average"], strict=False)
    ids = token_ids(learner.tokenizer, captions)
    nothing = token_ids(learner.tokenizer, [""])

    def loss(step: int):
        """Loss of a step's share of images, and what is logged of it."""
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
    """Draw stratified times (batch,) in (0, 1), in random order: a quarter uniform, the rest logit-normal.

    The logit has mean 0.25 and standard deviation 1.
    """
    u = stratified(batch, draw).clamp(1e-4, 1 - 1e-4)
    return torch.where(torch.arange(batch) % 4 == 0, u, torch.sigmoid(0.25 + torch.special.ndtri(u)))


def pipeline(learner: Learner, vae: Autoencoder) -> StableDiffusion3Pipeline:
    """Assemble the pipeline of a trained learner and its autoencoder."""
    return StableDiffusion3Pipeline(
        transformer=learner.transformer,
        scheduler=build_scheduler(),
        vae=cast(AutoencoderKL, vae),
        text_encoder=learner.first,
        tokenizer=learner.tokenizer,
        text_encoder_2=learner.second,
        tokenizer_2=learner.tokenizer,
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]  # optional, but annotated as required
        tokenizer_3=None,
    )

"""Pipelines with published configs and random weights, created on the device, and random pairs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from capo.backbones import Backbone, MMDiTBackbone, UNetBackbone
from capo.backbones.base import scheduler_class
from capo.data import PreferenceBatch
from capo.preflight.architecture import Blueprint, fresh_module, published
from capo.runtime.options import number, whole_number

FULL, TINY = "full", "tiny"
MODELS = ("sdxl", "sd3")
T5_TOKENS = 256
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NARROW_CLIP = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 8,
}
NARROW = {  # changes that make a published config tiny; 64 x 64 images, 8 x 8 latents
    "text_encoder": NARROW_CLIP,
    "text_encoder_2": {**NARROW_CLIP, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16},
    "text_encoder_3": {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1},
    "vae": {
        "block_out_channels": [8, 8, 8, 8],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 64,
    },
    "unet": {
        "block_out_channels": [8, 16, 16],
        "attention_head_dim": [1, 2, 2],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
        "sample_size": 8,
    },
    "transformer": {
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8 + 16,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    },
}


def sized_blueprint(model: str, size: str) -> Blueprint:
    """Published configs of `model`; with size `tiny`, the same classes and blocks with a few channels."""
    full = published(model, sequence_length=T5_TOKENS)
    if size == FULL:
        return full
    configs = {name: config | NARROW[name] for name, config in full.configs.items()}
    return replace(full, text=json.dumps(configs, sort_keys=True))


def random_module(
    blueprint: Blueprint, component: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Create a component with the random weights of its class, directly on the device.

    Initializing 5 billion weights on a CPU would take minutes.
    """
    with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        module = fresh_module(blueprint.configs[component])
    nn.Module.to(module, device, dtype)  # diffusers' override of `to` gives irrelevant warnings
    return module.eval().requires_grad_(False)


def _clip_tokenizer() -> CLIPTokenizer:
    # one token per letter: the encoders' work does not depend on which tokens they get
    pieces = [
        *(letter + end for letter in LETTERS for end in ("", "</w>")),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -1.0) for letter in LETTERS),
        ("\u2581", -2.0),
    ]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def conditioning_parts(
    blueprint: Blueprint, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """VAE and text encoders by name, with random weights."""
    names = ["vae", *blueprint.encoder_names]
    return {name: random_module(blueprint, name, device, dtype) for name in names}


def all_parts(blueprint: Blueprint, device: torch.device) -> dict[str, nn.Module]:
    """Denoiser, VAE and text encoders by name, with random weights in float32."""
    name = blueprint.denoiser_name
    return {
        name: random_module(blueprint, name, device),
        **conditioning_parts(blueprint, device, torch.float32),
    }


def random_pipeline(model: str, parts: Mapping[str, nn.Module | None]) -> DiffusionPipeline:
    """Diffusers pipeline with the published schedule and the given parts; missing parts are None."""
    if model == "sd3":
        pipeline = StableDiffusion3Pipeline(
            **_all(parts, ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_clip_tokenizer(),
            tokenizer_3=_t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    else:
        pipeline = StableDiffusionXLPipeline(
            **_all(parts, ("unet", "vae", "text_encoder", "text_encoder_2")),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_clip_tokenizer(),
            scheduler=DDIMScheduler(  # pyright: ignore[reportArgumentType]  # typed as an enumeration
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _all(parts: Mapping[str, nn.Module | None], names: Collection[str]) -> dict[str, Any]:
    return {name: parts.get(name) for name in names}


class RandomWeights(Backbone):
    """Mixin that replaces `Backbone.__init__` by one that takes an existing pipeline instead of a folder."""

    def __init__(self, model: str, pipeline: DiffusionPipeline, scheduler: str | None = None):
        self.weights = self.name = model
        self.pipeline, self.sequence_length, self.dtype = pipeline, T5_TOKENS, torch.float32
        if scheduler is not None:
            self.pipeline.scheduler = self._converted(scheduler_class(scheduler))
        self.check_schedule()

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of no files: a pool of such a backbone lasts as long as the process that made it."""
        return {"denoiser": "0" * 64, "latent_space": "1" * 64, "text_encoders": "2" * 64}


class RandomUNet(RandomWeights, UNetBackbone):
    """SDXL backbone with random weights."""


class RandomMMDiT(RandomWeights, MMDiTBackbone):
    """SD3 backbone with random weights."""


def random_backbone(
    model: str, parts: Mapping[str, nn.Module | None], scheduler: str | None = None
) -> Backbone:
    """Backbone of `model` with the given parts; missing parts are None."""
    kind = RandomMMDiT if model == "sd3" else RandomUNet
    return kind(model, random_pipeline(model, parts), scheduler)


def random_pairs(blueprint: Blueprint, pairs: int, device: torch.device) -> PreferenceBatch:
    """Batch of B = `pairs` random pairs: latents (B, 2, C, H, W) and text in a pool's shapes, dR = 0.2."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device)

    text = {name: normal(pairs, *shape) for name, shape in blueprint.text_shapes.items()}
    if "time_ids" in text:
        height, width = (8 * side for side in blueprint.latent_shape[1:])
        text["time_ids"] = torch.tensor(
            [[height, width, 0, 0, height, width]], dtype=torch.float32, device=device
        ).repeat(pairs, 1)
    rewards = torch.tensor([[0.6, 0.4]], device=device).repeat(pairs, 1)
    u = (torch.arange(pairs, device=device) + 0.5) / pairs
    shape = (pairs, 2, *blueprint.latent_shape)
    return PreferenceBatch(
        normal(*shape), normal(*shape), u, rewards, text, [f"pair {row}" for row in range(pairs)]
    )


def sized_options(
    description: str, results: str, rounds: str, round_count: int, minutes: float
) -> argparse.ArgumentParser:
    """Options of a benchmark at full or tiny size.

    Args:
        description: docstring of the script.
        results: first word of the name of the results file.
        rounds: meaning of the option --rounds.
        round_count: default of --rounds.
        minutes: default of --minutes.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--size", choices=(FULL, TINY), default=FULL)
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--results", type=Path, help=f"JSON file; default benchmarks/results/{results}_MODEL_SIZE.json"
    )
    parser.add_argument(
        "--rounds", type=whole_number(), default=round_count, help=f"{rounds}; default {round_count}"
    )
    parser.add_argument(
        "--minutes",
        type=number(),
        default=minutes,
        help=f"start nothing new after this time; default {minutes:g}",
    )
    parser.add_argument("--threads", type=whole_number(), default=None, help="default: all cores")
    return parser

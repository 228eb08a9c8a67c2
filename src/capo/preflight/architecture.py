"""A pipeline's architecture from its configs: meta-device modules and input shapes, without weights.

`published/<name>.json` holds the configs of a published model: those keys of the hub's config.json files that
determine sizes and FLOPs. A folder in diffusers' format brings its own configs.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from capo.errors import InputError

DIFFUSERS = {kind.__name__: kind for kind in (AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel)}
TRANSFORMERS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)}
DENOISERS = ("unet", "transformer")
TIME_IDS = 6  # numbers of SDXL's size conditioning


@dataclass(frozen=True)
class Blueprint:
    """Configs of a pipeline's modules; hashable, so that results computed from it can be cached.

    Attributes:
        text: JSON text of {component: config}.
        sequence_length: number of T5 tokens, for pipelines with a T5; 0 for others.
    """

    text: str
    sequence_length: int = 0

    @cached_property
    def configs(self) -> dict[str, dict]:
        """Configs by component."""
        return json.loads(self.text)

    @property
    def denoiser_name(self) -> str:
        """Name of the component that is tuned, `unet` or `transformer`."""
        return next(name for name in DENOISERS if name in self.configs)

    @property
    def encoder_names(self) -> list[str]:
        """Names of the text encoders, sorted."""
        return sorted(name for name in self.configs if name.startswith("text_encoder"))

    def module(self, component: str) -> nn.Module:
        """Build the component on the meta device: float32, all parameters trainable."""
        config = self.configs[component]
        with torch.device("meta"):
            if "_class_name" in config:
                return DIFFUSERS[config["_class_name"]].from_config(config)
            kind = TRANSFORMERS[config["architectures"][0]]
            return kind(
                kind.config_class(**{key: value for key, value in config.items() if key != "architectures"})
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one latent."""
        config = self.configs[self.denoiser_name]
        size = config["sample_size"]
        return (config["in_channels"], *((size, size) if isinstance(size, int) else size))

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a prompt's conditioning by their names in a pool, without the batch dimension."""
        config = self.configs[self.denoiser_name]
        tokens = self.configs["text_encoder"]["max_position_embeddings"]
        if self.denoiser_name == "transformer":
            width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
            return {
                "prompt_embeds": (tokens + self.sequence_length, width),
                "pooled_prompt_embeds": (pooled,),
            }
        words = {"prompt_embeds": (tokens, config["cross_attention_dim"])}
        if config.get("addition_embed_type") != "text_time":
            return words
        pooled = (
            config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        )
        return words | {"pooled_prompt_embeds": (pooled,), "time_ids": (TIME_IDS,)}

    def inputs(self, images: int) -> dict[str, object]:
        """Build uninitialized arguments for the denoiser, for `images` at once, on the current device."""
        text = {name: torch.empty(images, *shape) for name, shape in self.text_shapes.items()}
        noisy, words = torch.empty(images, *self.latent_shape), text["prompt_embeds"]
        if self.denoiser_name == "transformer":
            return {
                "hidden_states": noisy,
                "encoder_hidden_states": words,
                "pooled_projections": text["pooled_prompt_embeds"],
                "timestep": torch.empty(images),
            }
        added: dict[str, Tensor] | None = None
        if "pooled_prompt_embeds" in text:
            added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": text["time_ids"]}
        return {
            "sample": noisy,
            "timestep": torch.zeros(images, dtype=torch.long),
            "encoder_hidden_states": words,
            "added_cond_kwargs": added,
        }


def _blueprint(configs: dict[str, dict], left_out: Collection[str], sequence_length: int) -> Blueprint:
    kept = {name: config for name, config in configs.items() if name not in left_out}
    return Blueprint(json.dumps(kept, sort_keys=True), sequence_length if "transformer" in kept else 0)


def published_names() -> list[str]:
    """List the published models whose configs are in this package."""
    return sorted(
        path.name.removesuffix(".json")
        for path in importlib.resources.files("capo.preflight.published").iterdir()
        if path.name.endswith(".json")
    )


def published(name: str, left_out: Collection[str] = (), sequence_length: int = 0) -> Blueprint:
    """Return the blueprint of a published model, without the components `left_out`.

    Raises InputError for a name whose configs are not in this package.
    """
    if name not in published_names():
        raise InputError(
            f"model.published={name}: no configs of that name are in this package; choose one of "
            f"{', '.join(published_names())}, or give model.backbone.weights=FOLDER to use its own configs"
        )
    text = (
        importlib.resources.files("capo.preflight.published")
        .joinpath(f"{name}.json")
        .read_text(encoding="utf-8")
    )
    return _blueprint(json.loads(text)["components"], left_out, sequence_length)


def from_folder(folder: Path, left_out: Collection[str] = (), sequence_length: int = 0) -> Blueprint:
    """Return the blueprint of a pipeline folder, without the components `left_out`.

    Raises InputError if the folder lacks a denoiser, a VAE or a text encoder of a known class.
    """
    configs = {}
    for path in sorted(folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
        if kind in DIFFUSERS or kind in TRANSFORMERS:
            # The folder's origin and its dtype are not part of the architecture.
            configs[path.parent.name] = {
                key: value
                for key, value in config.items()
                if key not in ("_name_or_path", "dtype", "torch_dtype")
            }
    lacking = [
        part
        for part, there in {
            "unet or transformer": DENOISERS,
            "vae": ("vae",),
            "text_encoder": ("text_encoder",),
        }.items()
        if not any(name in configs for name in there)
    ]
    if lacking:
        raise InputError(
            f"weights '{folder}': no config.json of a known class for {', '.join(lacking)}; "
            "give the folder of a diffusers pipeline"
        )
    return _blueprint(configs, left_out, sequence_length)

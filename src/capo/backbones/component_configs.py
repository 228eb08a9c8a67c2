"""Configurations of a pipeline's components: what libraries read of them unchecked is checked before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from capo.errors import DamagedFile
from capo.runtime.reading import FOLDER_REMEDY, read_any_json, read_json
from capo.runtime.schema import Said, Section, faults, key
from capo.runtime.stored import Record

CONFIG, TOKENIZER, SCHEDULER = "config.json", "tokenizer_config.json", "scheduler_config.json"
Side = Annotated[int, Field(ge=1, le=2**16)]
# of a network, beyond what any model has: libraries would try to build it
Size = Annotated[int, Field(ge=1, le=2**16)]
Sizes = Annotated[
    Size | list[Size | None] | None, Said("a whole number from 1 to 65536, a list of them, or null")
]
Depth = Annotated[int, Field(ge=1, le=1024)]
Layers = Annotated[
    Depth | list[Depth | list[Depth]] | None, Said("a whole number from 1 to 1024, a list of them, or null")
]
# far beyond what any model has: images and times would not be finite
Factor = Annotated[float, Field(gt=0, le=10000)]
Offset = Annotated[float, Field(ge=-10000, le=10000)]
Share = Annotated[float, Field(gt=0, lt=1)]
Statistics = Annotated[
    Annotated[list[Offset], Field(min_length=1)] | None, Said("a list of a number for each channel, or null")
]
Deviations = Annotated[  # latents are divided by them
    Annotated[list[Factor], Field(min_length=1)] | None,
    Said("a list of a number above 0 for each channel, or null"),
]
Count = Annotated[int, Field(ge=1, le=2**24)]  # of tokens


class Network(Record):
    """What pipelines read of the config.json of a network of diffusers, where it is there."""

    sample_size: Annotated[
        Side | Annotated[list[Side], Field(min_length=2, max_length=2)],
        Said("a whole number from 1 on, or two of them"),
    ] = key("sides of its latents or images", 1)
    scaling_factor: Factor = key("factor of a VAE's latents", 1.0)
    shift_factor: Offset | None = key("shift of a VAE's latents", None)
    latents_mean: Statistics = key("mean of a VAE's latents by channel", None)
    latents_std: Deviations = key("standard deviation of a VAE's latents by channel", None)
    norm_eps: Share = key("what a normalization adds to the variance", 1e-5)
    freq_shift: Offset = key("shift of the frequencies of an embedded time", 0)
    addition_time_embed_dim: Annotated[int, Field(ge=1)] | None = key("width of an embedded size", None)
    in_channels: Sizes = key("channels of the input", None)
    out_channels: Sizes = key("channels of the output", None)
    latent_channels: Sizes = key("channels of a VAE's latents", None)
    block_out_channels: Sizes = key("channels of its blocks", None)
    layers_per_block: Layers = key("layers of a block", None)
    transformer_layers_per_block: Layers = key("transformers of a block", None)
    norm_num_groups: Sizes = key("groups of a normalization", None)
    num_layers: Layers = key("layers", None)
    num_attention_heads: Sizes = key("heads of an attention layer", None)
    attention_head_dim: Sizes = key("width of a head, or their number", None)
    cross_attention_dim: Sizes = key("width of the text", None)
    joint_attention_dim: Sizes = key("width of the text", None)
    caption_projection_dim: Sizes = key("width of the projected text", None)
    pooled_projection_dim: Sizes = key("width of the pooled text", None)
    patch_size: Sizes = key("side of a patch", None)
    pos_embed_max_size: Sizes = key("patches of a side, at most", None)


class Encoder(Record):
    """What sets the sizes of a text encoder of transformers in its config.json, where it is there."""

    hidden_size: Size = key("width", 1)
    intermediate_size: Size = key("width of a layer's inner part", 1)
    num_hidden_layers: Depth = key("layers", 1)
    num_attention_heads: Size = key("heads of an attention layer", 1)
    projection_dim: Size = key("width of the projected text", 1)
    d_model: Size = key("width", 1)
    d_ff: Size = key("width of a layer's inner part", 1)
    d_kv: Size = key("width of a head", 1)
    num_layers: Depth = key("layers", 1)
    num_heads: Size = key("heads of an attention layer", 1)
    layer_norm_eps: Share = key("what a normalization adds to the variance", 1e-5)
    vocab_size: Count = key("tokens that it knows", 1)
    max_position_embeddings: Count = key("tokens of a prompt", 1)


class Scheduler(Record):
    """What is read of a scheduler_config.json, where it is there."""

    num_train_timesteps: Size = key("times of the training", 1)
    beta_start: Share = key("variance that the first time adds", 1e-4)
    beta_end: Share = key("variance that the last time adds", 0.02)
    trained_betas: Annotated[list[float] | None, Said("a list of numbers, or null")] = key("variances", None)
    steps_offset: Annotated[int, Field(ge=0, le=2**16)] = key("offset of the times of sampling", 0)
    clip_sample_range: Factor = key("bound of a latent", 1.0)
    shift: Factor = key("shift of a flow's times", 1.0)
    flow_shift: Factor = key("shift of a flow's times", 1.0)


class Tokenizer(Record):
    """What is read of a tokenizer_config.json, where it is there."""

    model_max_length: Annotated[
        Annotated[int, Field(ge=2)] | Annotated[float, Field(ge=2)], Said("a number of tokens, at least 2")
    ] = key("tokens of a prompt, start and end included", 2)


def check_configs(*components: Path) -> None:
    """Raise DamagedFile for a JSON file of a component that cannot be used: libraries do not name the file.

    A config.json holds an object: what a text there names, diffusers would get from the hub.
    """
    for component in components:
        for path in sorted(component.glob("*.json")):
            values = (read_json if path.name == CONFIG else read_any_json)(path, FOLDER_REMEDY)
            schema = _schema(path.name, values)
            if schema is not None and (found := faults(schema, values)):
                raise DamagedFile(path, "; ".join(found.values()), FOLDER_REMEDY)
            if schema is Network:
                _check_statistics(path, values)


def _check_statistics(path: Path, values: dict[str, Any]) -> None:
    channels = values.get("latent_channels")
    for name in ("latents_mean", "latents_std"):
        given = values.get(name)
        if given is not None and channels is not None and len(given) != channels:
            told = f"{name} has {len(given)} numbers, and latent_channels={channels}: must be as many"
            raise DamagedFile(path, told, FOLDER_REMEDY)


def _schema(name: str, values: object) -> type[Section] | None:
    if name != CONFIG or not isinstance(values, dict):
        return {TOKENIZER: Tokenizer, SCHEDULER: Scheduler}.get(name)
    return Network if "_class_name" in values else Encoder

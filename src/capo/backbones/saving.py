"""Save a backbone's pipeline with another denoiser, as a folder in diffusers' format."""

import copy
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from capo.backbones.base import Backbone
from capo.backbones.lora import has_adapter, merged
from capo.backbones.models import Autoencoder, Denoiser
from capo.backbones.original_layout import (
    marks,
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
)
from capo.backbones.precision import cpu_copy
from capo.runtime.files import fresh_folder
from capo.runtime.weight_files import weight_files

INDEX = "model_index.json"  # of every pipeline folder
CHECKPOINT_FILE = "checkpoint.safetensors"  # the whole model in one file, for other programs


def write_pipeline(
    backbone: Backbone, folder: str | Path, denoiser: Denoiser, dtype: torch.dtype = torch.float32
) -> None:
    """Write the pipeline, with `denoiser` in place of its own, to a folder in `dtype`, adapter merged."""
    pipeline = copy.copy(backbone.pipeline)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    modules[backbone.denoiser_component] = whole_denoiser(backbone, denoiser)
    pipeline.register_modules(**{name: in_dtype(module, dtype) for name, module in modules.items()})
    _forget_calls(pipeline)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _drop_origins(Path(folder))


def write_checkpoint(backbone: Backbone, denoiser: Denoiser, file: Path) -> None:
    """Write UNet, VAE and text encoders to one file in the layout of the published model, in float16."""
    pipeline = backbone.pipeline
    second = getattr(pipeline, "text_encoder_2", None)
    weights = original_weights(
        whole_denoiser(backbone, denoiser), backbone.vae, pipeline.text_encoder, second
    )
    half = {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in weights.items()}
    save_file(half | marks(pipeline.scheduler.config), file, metadata={"format": "pt"})


def original_weights(
    unet: Denoiser, vae: Autoencoder, text_encoder: nn.Module, text_encoder_2: nn.Module | None
) -> dict[str, Tensor]:
    """Return all weights by their names in the published model; `text_encoder_2`: SDXL's."""
    return {
        **original_unet(unet.state_dict(), unet.config["layers_per_block"]),
        **original_vae(vae.state_dict()),
        **original_clip(text_encoder.state_dict(), alone=text_encoder_2 is None),
        **({} if text_encoder_2 is None else original_open_clip(text_encoder_2.state_dict())),
    }


def save(backbone: Backbone, folder: str | Path, denoiser: Denoiser) -> None:
    """Write the pipeline, with `denoiser` in place of its own, replacing `folder` atomically."""
    with fresh_folder(folder, INDEX) as fresh:
        write_pipeline(backbone, fresh, denoiser)


def whole_denoiser(backbone: Backbone, denoiser: Denoiser) -> Denoiser:
    """Return the denoiser itself or, of one with an adapter, a plain one with the adapter merged.

    It is merged into the base as it was loaded, whatever dtype the policy's frozen weights have.
    """
    return merged(denoiser, backbone.trainable_copy()) if has_adapter(denoiser) else denoiser


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module itself if it has `dtype` throughout, else a copy on the CPU that has."""
    if all(p.dtype == dtype for p in module.parameters() if p.is_floating_point()):
        return module
    return nn.Module.to(cpu_copy(module), dtype)  # diffusers' own `to` would warn that it rounds


def _forget_calls(pipeline: DiffusionPipeline) -> None:
    """Give tokenizers the state before any call, which tokenizer.json holds; every call sets it anew.

    Otherwise the file would depend on whether this process encoded prompts or found them in a pool.
    """
    for part in pipeline.components.values():
        if backend := getattr(part, "backend_tokenizer", None):
            backend.no_truncation()
            backend.no_padding()


def _drop_origins(folder: Path) -> None:
    """Remove from the configs the path, on this machine, that their weights were loaded from."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stored_dtype(folder: Path) -> str:
    """Return torch's name of the dtype of a component's weights, which the first of its tensors has."""
    with safe_open(str(next(iter(weight_files(folder).values()))), framework="pt") as file:
        return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")

"""A backbone's pipeline to a folder in diffusers' format, with another denoiser in it."""

import copy
import json
from pathlib import Path

import torch
from torch import nn

from capo.backbones.base import Backbone
from capo.backbones.lora import has_adapter, merged
from capo.runtime.files import fresh_folder


def write_pipeline(backbone: Backbone, folder: str | Path, denoiser: nn.Module) -> None:
    """Writes the pipeline with `denoiser` in its place to an existing folder: float32, adapter merged."""
    pipeline = copy.copy(backbone.pipeline)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if has_adapter(
        denoiser
    ):  # merged into the base as it was loaded, whatever the policy's own frozen weights are stored in
        denoiser = merged(denoiser, backbone.trainable_copy())
    modules[backbone.denoiser_component] = denoiser
    pipeline.register_modules(**{name: in_float32(module) for name, module in modules.items()})
    pipeline.save_pretrained(folder, safe_serialization=True)
    _drop_origins(Path(folder))


def save(backbone: Backbone, folder: str | Path, denoiser: nn.Module) -> None:
    """Writes the pipeline with `denoiser` in its place; replaces `folder`, never leaves half of one."""
    with fresh_folder(folder) as fresh:
        write_pipeline(backbone, fresh, denoiser)


def in_float32(module: nn.Module) -> nn.Module:
    """The module itself where it is float32 throughout, else a float32 copy on the CPU."""
    if all(p.dtype == torch.float32 for p in module.parameters() if p.is_floating_point()):
        return module
    return copy.deepcopy(module).to("cpu").float()


def _drop_origins(folder: Path) -> None:
    """Takes out of the configs where their weights were loaded from: a path of this machine."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

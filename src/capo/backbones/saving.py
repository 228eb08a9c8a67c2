"""Save a backbone's pipeline with another denoiser, as a folder in diffusers' format."""

import copy
import json
from pathlib import Path

import torch
from torch import nn

from capo.backbones.base import Backbone
from capo.backbones.lora import has_adapter, merged
from capo.backbones.models import Denoiser
from capo.backbones.precision import cpu_copy
from capo.runtime.files import fresh_folder


def write_pipeline(backbone: Backbone, folder: str | Path, denoiser: Denoiser) -> None:
    """Write the pipeline, with `denoiser` in place of its own, to a folder: float32, adapter merged."""
    pipeline = copy.copy(backbone.pipeline)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    # The adapter is merged into the base as it was loaded, whatever dtype the policy's frozen weights have.
    if has_adapter(denoiser):
        denoiser = merged(denoiser, backbone.trainable_copy())
    modules[backbone.denoiser_component] = denoiser
    pipeline.register_modules(**{name: in_float32(module) for name, module in modules.items()})
    pipeline.save_pretrained(folder, safe_serialization=True)
    _drop_origins(Path(folder))


def save(backbone: Backbone, folder: str | Path, denoiser: Denoiser) -> None:
    """Write the pipeline, with `denoiser` in place of its own, replacing `folder` atomically."""
    with fresh_folder(folder) as fresh:
        write_pipeline(backbone, fresh, denoiser)


def in_float32(module: nn.Module) -> nn.Module:
    """Return the module itself if it is float32 throughout, else a float32 copy on the CPU."""
    if all(p.dtype == torch.float32 for p in module.parameters() if p.is_floating_point()):
        return module
    return cpu_copy(module).float()


def _drop_origins(folder: Path) -> None:
    """Remove from the configs the path, on this machine, that their weights were loaded from."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

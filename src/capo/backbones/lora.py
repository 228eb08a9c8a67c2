"""Add, disable and merge LoRA adapters; with its adapter disabled, a denoiser is the frozen base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from capo.backbones.models import Denoiser
from capo.errors import DamagedFile, InputError
from capo.runtime.reading import read_json

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of diffusers' attention blocks
# An MMDiT block has a second set of projections, for the text tokens.
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ADAPTER = "default"


def read_base(folder: Path) -> dict[str, Any]:
    """Read what a policy says of its base. Raises FileNotFoundError, or DamagedFile if it cannot be read."""
    path, remedy = folder / BASE_FILE, "restore it, or export the policy again"
    base = read_json(path, remedy)
    for key in ("weights", "denoiser"):
        if not isinstance(base.get(key), str):
            raise DamagedFile(path, f"{key} is {base.get(key)!r}, which is no text", remedy)
    return base


def add_lora(
    denoiser: Denoiser, rank: int, alpha: float, targets: Sequence[str] = ATTENTION, seed: int = 0
) -> Denoiser:
    """Add a LoRA adapter (W + alpha / rank * B A, with B = 0 at first) to `denoiser` in place and return it.

    Afterwards only A and B are trainable, in float32. A is drawn from `seed`, independent of the global
    generator. Raises InputError if rank or alpha is not positive, or if no module's name ends in one of
    `targets`.
    """
    if rank < 1 or alpha <= 0:
        raise InputError(f"LoRA rank {rank} and alpha {alpha} must both be above 0 (model.lora)")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # peft divides it: any does
        target_modules=list(targets),
        init_lora_weights=True,
    )
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config, ADAPTER)
            for parameter in denoiser.parameters():
                if parameter.requires_grad:  # peft creates it in the dtype of its layer
                    parameter.data = parameter.data.float()
        except ValueError as error:
            raise InputError(f"LoRA targets {list(targets)}: {error}") from error
    return denoiser


def has_adapter(denoiser: nn.Module) -> bool:
    """Whether `denoiser` has a LoRA adapter."""
    return any(True for _ in adapter_layers(denoiser))


def adapter_layers(denoiser: nn.Module) -> Iterator[BaseTunerLayer]:
    """Iterate over the layers of `denoiser`, which may be wrapped, that have an adapter."""
    return (module for module in denoiser.modules() if isinstance(module, BaseTunerLayer))


def is_output_factor(name: str) -> bool:
    """Whether a parameter is the factor B of an adapter's product B A."""
    return ".lora_B." in name


@contextmanager
def adapter_off(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Disable the adapter for the block, in which `denoiser` computes the frozen base bit for bit."""
    layers = list(adapter_layers(denoiser))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield denoiser
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(denoiser: Denoiser, plain: Denoiser) -> Denoiser:
    """Merge `denoiser`'s adapter into `plain`, which has none, in place: W becomes W + alpha / rank * B A."""
    adapter = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    plain.add_adapter(denoiser.peft_config[ADAPTER], ADAPTER)
    set_peft_model_state_dict(
        plain, {name: tensor.to("cpu") for name, tensor in adapter.items()}, adapter_name=ADAPTER
    )
    plain.fuse_lora(safe_fusing=True)
    plain.unload_lora()
    return plain


LORA_FILE = "pytorch_lora_weights.safetensors"  # name that `load_lora_weights` expects
COMFYUI_FILE = "comfyui_lora.safetensors"  # the same adapter in the names of other programs
BASE_FILE = "base.json"  # file of an exported policy that names its base weights

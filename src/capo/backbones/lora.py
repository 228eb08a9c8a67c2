"""Low-rank adapters on a denoiser: add, switch off, merge. Switched off, the denoiser is the frozen base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from capo.errors import InputError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of diffusers' attention blocks
JOINT_ATTENTION = (
    *ATTENTION,
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)  # of images, and of text beside them
ADAPTER = "default"


def add_lora(
    denoiser: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ATTENTION, seed: int = 0
) -> nn.Module:
    """Puts a LoRA adapter (W + alpha / rank * B A, B = 0 at first) into `denoiser` itself and returns it.

    Only A and B are trainable afterwards, in float32. A is drawn from `seed`, whatever the global generator's state.
    Raises InputError where rank or alpha is not positive or no module's name ends in one of `targets`.
    """
    if rank < 1 or alpha <= 0:
        raise InputError(f"LoRA rank {rank} and alpha {alpha} must both be above 0 (model.lora)")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config, ADAPTER)
            for parameter in denoiser.parameters():
                if parameter.requires_grad:  # peft makes it in the dtype of what it sits on
                    parameter.data = parameter.data.float()
        except ValueError as error:
            raise InputError(f"LoRA targets {list(targets)}: {error}") from error
    return denoiser


def has_adapter(denoiser: nn.Module) -> bool:
    """Whether `denoiser` carries a LoRA adapter."""
    return any(True for _ in adapter_layers(denoiser))


def adapter_layers(denoiser: nn.Module) -> Iterator[BaseTunerLayer]:
    """The layers of `denoiser`, wrapped or not, that carry an adapter."""
    return (module for module in denoiser.modules() if isinstance(module, BaseTunerLayer))


@contextmanager
def adapter_off(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Within the block `denoiser` computes the frozen base, bit for bit; then the adapter is on again."""
    layers = list(adapter_layers(denoiser))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield denoiser
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(denoiser: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain`, a denoiser without an adapter, with `denoiser`'s merged into it: W + alpha / rank * B A in place of W."""
    adapter = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    plain.add_adapter(denoiser.peft_config[ADAPTER], ADAPTER)
    set_peft_model_state_dict(
        plain, {name: tensor.to("cpu") for name, tensor in adapter.items()}, adapter_name=ADAPTER
    )
    plain.fuse_lora(safe_fusing=True)
    plain.unload_lora()
    return plain


LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for


BASE_FILE = "base.json"  # beside a LoRA file: the weights it belongs to

"""What moves the weights: AdamW, its 8-bit form, and the norm of the gradients over all processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from capo.errors import InputError

ADAMW, ADAMW_8BIT = "adamw", "adamw_8bit"
FUSED_ON = ("cpu", "cuda")


def check_optimizer(name: str) -> None:
    """InputError where the optimizer of that name needs a package that is not installed."""
    if name == ADAMW_8BIT and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "trainer.optimizer=adamw_8bit needs bitsandbytes: pip install 'capo[bitsandbytes]', or choose adamw"
        )
    if name == ADAMW_8BIT and not torch.cuda.is_available():
        raise InputError(
            "trainer.optimizer=adamw_8bit needs a CUDA device, and torch sees none here: choose adamw"
        )


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], lr: float, scaled: bool = False
) -> Optimizer:
    """AdamW without weight decay. `scaled`: gradients come scaled, as under 16-mixed, where a fused step would unscale them itself.

    Fused where torch has it: one pass over the weights in place of a dozen. Raises InputError where the 8-bit form's package is missing.
    """
    if name == ADAMW_8BIT:
        check_optimizer(name)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=lr, weight_decay=0.0)
    fused = not scaled and all(p.device.type in FUSED_ON and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=fused)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients, a scalar, the same in all processes; a norm above `limit` is scaled down to it.

    Sharded gradients are reduced over the processes; those of DDP are the same everywhere already.
    """
    moved = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in moved])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(moved, limit, norm)
    return norm

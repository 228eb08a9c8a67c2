"""Dtypes by name, and the frozen reference stored for the policy's precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from capo.errors import InputError

Network = TypeVar("Network", bound=nn.Module)

# Lightning's name of a mixed precision -> autocast's dtype
HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
AUTOCAST = {"32-true": None, **HALVES}  # all precisions; None: no autocast
PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)  # layers whose weights autocast casts to half precision


def frozen_reference(denoiser: Network, precision: str) -> Network:
    """Return the reference whose outputs equal, bit for bit, those of a float32 policy with its weights.

    Under autocast this is a copy whose linear and convolution weights are stored in autocast's dtype, to
    which it would round them anyway, and all other weights in float32: half the memory. Without autocast it
    is the denoiser itself if it is float32, and else a float32 copy.
    """
    if precision not in HALVES and all(p.dtype == torch.float32 for p in denoiser.parameters()):
        return denoiser
    return half_stored(cpu_copy(denoiser).float(), precision).eval().requires_grad_(False)


def cpu_copy(module: Network) -> Network:
    """Copy a module on the CPU, so that its device never holds it twice."""
    home = next(module.parameters()).device
    try:
        return copy.deepcopy(module.to("cpu"))
    finally:
        module.to(home)


def half_stored(denoiser: Network, precision: str) -> Network:
    """Store the float32 `denoiser`'s linear and convolution weights in the dtype that autocast casts them to.

    The denoiser is changed in place and returned; without autocast nothing changes.
    """
    for module in denoiser.modules() if precision in HALVES else ():
        if isinstance(module, PRODUCTS):
            module.to(HALVES[precision])
    return denoiser


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def named_dtype(dtype: str) -> torch.dtype:
    """Return torch's dtype of that name; raise InputError for an unknown name."""
    if dtype not in DTYPES:
        raise InputError(f"model dtype '{dtype}' is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextmanager
def marked_as_trained(module: nn.Module) -> Iterator[None]:
    """Mark the module's weights as requiring gradients for the block, like a policy's; gradients must be off.

    For a batch of strided matrices times a weight, torch chooses another algorithm, with other rounding, if
    the weight requires a gradient (`should_fold` in ATen's matmul). Without the mark, a frozen copy of a
    policy would differ from it in the last bits.
    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)

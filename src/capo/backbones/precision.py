"""Dtypes by name, and weights stored for the precision in which a network computes."""

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


def common_half(*precisions: str) -> torch.dtype | None:
    """Dtype that all of `precisions` (Lightning's names) autocast to; None without one in common."""
    return AUTOCAST[precisions[0]] if len(set(precisions)) == 1 else None


def cpu_copy(module: Network) -> Network:
    """Copy a module on the CPU, so that its device never holds it twice."""
    home = next(module.parameters()).device
    try:
        return copy.deepcopy(module.to("cpu"))
    finally:
        module.to(home)


def half_stored(denoiser: Network, precision: str) -> Network:
    """Store the `denoiser`'s linear and convolution weights in the dtype that autocast casts them to.

    The denoiser is changed in place and returned; without autocast nothing changes.
    """
    for module in denoiser.modules() if precision in HALVES else ():
        if isinstance(module, PRODUCTS):
            module.to(HALVES[precision])
    return denoiser


def stored_for(denoiser: nn.Module, precision: str) -> bool:
    """Whether the weights are stored as `half_stored` stores those of a float32 denoiser."""
    half = HALVES.get(precision, torch.float32)
    return all(
        parameter.dtype == (half if isinstance(module, PRODUCTS) else torch.float32)
        for module in denoiser.modules()
        for parameter in module.parameters(recurse=False)
    )


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

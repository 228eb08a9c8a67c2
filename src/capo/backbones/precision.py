"""The frozen side of every comparison: the base's denoiser as the policy's precision wants it, and its memory format."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from capo.errors import InputError

HALVES = {
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}  # Lightning's names of autocast -> its dtype


def frozen_reference(denoiser: nn.Module, precision: str) -> nn.Module:
    """The base for the policy's dtype path: bit-equal to a float32 policy of the same weights.

    Under autocast a copy whose linear and convolution weights are stored in its dtype, to which autocast would round
    them anyway, and all else in float32: half the memory. Without, the denoiser itself, or a float32 copy of one that
    is not.
    """
    if precision not in HALVES and all(p.dtype == torch.float32 for p in denoiser.parameters()):
        return denoiser
    return half_stored(cpu_copy(denoiser).float(), precision).eval().requires_grad_(False)


def cpu_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU; a device never holds the module twice."""
    home = next(module.parameters()).device
    try:
        return copy.deepcopy(module.to("cpu"))
    finally:
        module.to(home)


def half_stored(denoiser: nn.Module, precision: str) -> nn.Module:
    """The float32 `denoiser` itself, its linear and convolution weights now in the dtype that autocast rounds them to anyway.

    Without autocast nothing changes.
    """
    for module in denoiser.modules() if precision in HALVES else ():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            module.to(HALVES[precision])
    return denoiser


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def named_dtype(dtype: str) -> torch.dtype:
    """Torch's dtype of that name; InputError for another name."""
    if dtype not in DTYPES:
        raise InputError(f"model dtype '{dtype}' is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


# Lightning's name of a precision -> what autocast computes in
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@contextmanager
def marked_as_trained(module: nn.Module) -> Iterator[None]:
    """Within the block the module's weights require gradients, as those of a policy do; gradients must be off.

    torch computes a product of a batch of strided matrices with a weight in another way, rounded otherwise, where the weight
    requires a gradient (`should_fold` in ATen's matmul): a frozen copy of the same weights would differ in the last bits.
    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)

"""Drift in weights: how far a policy's weights have moved from its base's, by block of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from capo.backbones.lora import LORA_FILE
from capo.backbones.merging_adapters import adapter_factors
from capo.errors import InputError
from capo.runtime.tensor_files import DTYPES, Home, RowReader, spans, tensor_homes

TUNED_FROM = "give the model that the policy was tuned from"


@dataclass(frozen=True)
class WeightDrift:
    """Norm of the change of weights, relative to the base's: `|theta - theta_ref| / |theta_ref|`.

    Attributes:
        total: of all weights.
        blocks: of each block of the denoiser, in the order of the base's files; None where the base's are 0.
    """

    total: float | None
    blocks: Mapping[str, float | None]


def weight_drift(base: Path, variant: str | None, dtype: torch.dtype, policy: Path) -> WeightDrift:
    """Compare the weights of an exported policy with its base's, a part of one tensor at a time.

    The base's weights are rounded as the policy's were, to the dtype in which the base was loaded and to the
    one in which the policy is stored, so that a policy that was not tuned has a drift of exactly 0. Of an
    adapter, the change is its product `alpha / rank * B A`, whose norm follows from the factors.

    Args:
        base: folder of the base's denoiser.
        variant: variant of the base's weight files.
        dtype: the dtype that the base was loaded in.
        policy: folder of the policy; that of its denoiser has the same name as the base's.

    Raises:
        InputError: a file cannot be read, holds an adapter of another kind, or does not fit the base.
    """
    origin, read = tensor_homes(base, variant), RowReader()
    if (policy / LORA_FILE).is_file():
        moved = _of_adapter(policy, base.name)
    else:
        moved = _of_whole(tensor_homes(policy / base.name), origin, dtype, read)
    changes = dict.fromkeys(map(block_of, origin), 0.0)
    norms = dict(changes)
    for name, square in moved.items():
        if name not in origin or not math.isfinite(square):
            fault = "is not finite" if name in origin else f"is not in its base '{base}'"
            raise InputError(f"tensor '{name}' of '{policy}' {fault}; {TUNED_FROM}")
        changes[block_of(name)] += square
    for name, home in origin.items():
        norms[block_of(name)] += sum(part.double().square().sum().item() for part in _parts(name, home, read))
    return WeightDrift(
        _relative(sum(changes.values()), sum(norms.values())),
        {name: _relative(square, norms[name]) for name, square in changes.items()},
    )


def block_of(name: str) -> str:
    """Block of a tensor: `down_blocks.0` of `down_blocks.0.resnets.1.bias`, `conv_in` of `conv_in.bias`."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def _relative(change: float, norm: float) -> float | None:
    return math.sqrt(change / norm) if norm else None


def _parts(name: str, home: Home, read: RowReader) -> Iterator[Tensor]:
    """Yield the parts of a tensor; none of one without floating point values, which is not tuned."""
    file, dtype, shape = home
    if dtype in DTYPES:
        yield from (read(file, name, span) for span in spans(shape))


def _of_whole(
    tuned: Mapping[str, Home], origin: Mapping[str, Home], dtype: torch.dtype, read: RowReader
) -> dict[str, float]:
    """Squared norm of the change of each tensor."""
    if odd := sorted(tuned.keys() ^ origin.keys()):
        raise InputError(
            f"policy and base differ in the tensors that they hold, for instance '{odd[0]}'; {TUNED_FROM}"
        )
    squares = {}
    for name, home in tuned.items():
        if origin[name][2] != home[2]:
            raise InputError(
                f"'{name}' has shape {home[2]} in '{home[0]}', {origin[name][2]} in its base; {TUNED_FROM}"
            )
        pairs = zip(_parts(name, home, read), _parts(name, origin[name], read), strict=True)
        squares[name] = sum(
            (ours.double() - base.to(dtype).to(ours.dtype).double()).square().sum().item()
            for ours, base in pairs
        )
    return squares


def _of_adapter(policy: Path, component: str) -> dict[str, float]:
    """`|B A|^2 = sum((B^T B) * (A A^T))` by the name of each layer's weight."""
    squares = {}
    for layer, factors in adapter_factors(policy, component).items():
        a, b = (factor.double() for factor in factors)
        squares[f"{layer}.weight"] = ((b.T @ b) * (a @ a.T)).sum().item()
    return squares

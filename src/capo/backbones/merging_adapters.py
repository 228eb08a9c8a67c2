"""Merge LoRA adapters by their products B A, never A and B apart."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from capo.backbones.export import write_adapter
from capo.backbones.family import Family
from capo.backbones.finding import pipeline_index
from capo.backbones.lora import LORA_FILE
from capo.errors import DamagedFile, InputError
from capo.runtime.reading import parse_object
from capo.runtime.tensor_files import AGAIN, readable_tensors
from capo.soup import coefficients

METADATA = "lora_adapter_metadata"  # diffusers' key for an adapter's settings, in the file's metadata
# settings of an adapter under which its layers compute more than alpha / rank * B A
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
Factors = Mapping[str, tuple[Tensor, Tensor]]  # layer -> (A (r, in), B (out, r)), whose product is B A


def merge_adapters(
    base: Path,
    family: type[Family],
    policies: Sequence[Path],
    fresh: Path,
    method: str,
    weights: Sequence[float],
) -> None:
    """Write the soup of adapters to the folder `fresh`, as one adapter at alpha = rank.

    Args:
        base: folder of the base's pipeline.
        family: its model family.
        policies: folders of the adapters; the settings and the scheduler are the first one's.
        fresh: an empty folder.
        method: `slerp` or `linear`.
        weights: one for each adapter (`capo.soup`).

    Raises:
        InputError: a file is no plain adapter of linear layers, or the layers have different sizes.
    """
    part = family.denoiser_component
    pipeline: Any = getattr(diffusers, pipeline_index(base, family.pipeline_classes)["_class_name"])
    read = [_read(policy / LORA_FILE) for policy in policies]
    scaled = [_scaled(policy / LORA_FILE, *found, part) for policy, found in zip(policies, read, strict=True)]
    layers = merged_factors(scaled, method, weights)
    rank = max(len(factor) for name, factor in layers.items() if ".lora_A." in name)
    settings = {key.removeprefix(f"{part}."): value for key, value in read[0][1].items() if "." in key}
    settings |= {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".lora_")[0] for name in layers}),
    }
    write_adapter(pipeline, part, family.kohya_prefix, layers, settings, fresh)
    if (scheduler := policies[0] / "scheduler").is_dir():
        shutil.copytree(scheduler, fresh / "scheduler")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the factors by name, and the settings, of an adapter."""
    with readable_tensors(file) as found:
        factors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 - not a mapping
        metadata = found.metadata() or {}
    try:
        return factors, parse_object(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise DamagedFile(file, f"its {METADATA}: {error}", AGAIN) from error


def adapter_factors(policy: Path, part: str) -> Factors:
    """Layer -> (A, alpha / rank * B), float32, of the adapter in a policy's folder; `part` is the denoiser.

    Raises InputError if the file cannot be read, or is no plain adapter of linear layers.
    """
    file = policy / LORA_FILE
    return _scaled(file, *_read(file), part)


def _scaled(file: Path, factors: Mapping[str, Tensor], settings: Mapping[str, Any], part: str) -> Factors:
    """Layer -> (A, alpha / rank * B), float32, of an adapter."""
    rank, alpha = (_positive(settings.get(f"{part}.{key}")) for key in ("r", "lora_alpha"))
    other = [key for key in OTHER_KINDS if settings.get(f"{part}.{key}")]
    other += [name for name, factor in factors.items() if not _is_linear(name, factor, part)][:1]
    if other or not rank or not alpha or not factors:
        told = other or (["it holds no tensors"] if not factors else ["no rank and alpha in its metadata"])
        raise InputError(
            f"'{file}' is no plain LoRA adapter of linear layers ({', '.join(told)}); only adapters that "
            "train.py exported are read"
        )
    for name in factors:
        if fault := _fault(factors, name):
            raise InputError(f"'{file}': {fault}; {AGAIN}")
    return {
        name.removeprefix(f"{part}.").split(".lora_A.")[0]: (
            factor.float(),
            factors[_partner(name)].float() * (alpha / rank),
        )
        for name, factor in factors.items()
        if ".lora_A." in name
    }


def _positive(value: Any) -> float:
    """Return the value if it is a number above 0, else 0."""
    return value if type(value) in (int, float) and value > 0 else 0


def _is_linear(name: str, factor: Tensor, part: str) -> bool:
    """Whether a tensor is a factor, A or B, of a linear layer of the denoiser."""
    return name.startswith(f"{part}.") and (".lora_A." in name or ".lora_B." in name) and factor.ndim == 2


def _partner(name: str) -> str:
    """Name of the factor B that belongs to an A, and of the A that belongs to a B."""
    own, other = (".lora_A.", ".lora_B.") if ".lora_A." in name else (".lora_B.", ".lora_A.")
    return name.replace(own, other)


def _fault(factors: Mapping[str, Tensor], name: str) -> str | None:
    """What is wrong with a factor, or None."""
    partner = factors.get(_partner(name))
    if partner is None:
        return f"its tensor {_partner(name)} is missing"
    if not factors[name].isfinite().all():
        return f"its tensor {name} holds values that are not finite"
    if ".lora_A." in name and len(factors[name]) != partner.shape[1]:
        return (
            f"its tensors {name} of shape {tuple(factors[name].shape)} and {_partner(name)} of shape "
            f"{tuple(partner.shape)} have different ranks"
        )
    return None


def merged_factors(adapters: Sequence[Factors], method: str, weights: Sequence[float]) -> dict[str, Tensor]:
    """Merge adapters layer by layer.

    The inner product of two products is `sum((B1^T B2) * (A1 A2^T))`, so none is ever formed. A layer that an
    adapter lacks counts as 0; where ranks differ by layer, zeros fill up.

    Returns:
        `LAYER.lora_A.weight` (R, in) and `LAYER.lora_B.weight` (out, R), with R the sum of the ranks; the
        merged product is theirs, at a scale of 1.
    """
    ranks = [max(len(a) for a, _ in adapter.values()) for adapter in adapters]
    merged: dict[str, Tensor] = {}
    for layer in dict.fromkeys(name for adapter in adapters for name in adapter):
        like_a, like_b = next(adapter[layer] for adapter in adapters if layer in adapter)
        pairs = [
            _padded(*adapter.get(layer, (like_a[:0], like_b[:, :0])), rank)
            for adapter, rank in zip(adapters, ranks, strict=True)
        ]
        if len({(a.shape[1], len(b)) for a, b in pairs}) > 1:
            raise InputError(
                f"policies: layer '{layer}' has different sizes in the adapters; merge those of one model"
            )
        exact = [(a.double(), b.double()) for a, b in pairs]
        gram = [[((b.T @ d) * (a @ c.T)).sum().item() for c, d in exact] for a, b in exact]
        numbers = coefficients(torch.tensor(gram, dtype=torch.float64), method, weights)
        merged[f"{layer}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        merged[f"{layer}.lora_B.weight"] = torch.cat(
            [number * b for number, (_, b) in zip(numbers, pairs, strict=True)], 1
        )
    return merged


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    lacking = rank - len(a)
    return torch.nn.functional.pad(a, (0, 0, 0, lacking)), torch.nn.functional.pad(b, (0, lacking))

"""Sizes, in bytes, of what a run holds in memory and writes to disk, computed from shapes alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import nn

from capo.backbones.precision import half_stored
from capo.data.scoring import SCORE_BYTES
from capo.preflight.architecture import Blueprint
from capo.preflight.tracing import Adapter, cast_bytes, policy_module
from capo.runtime.optimizers import ADAMW_8BIT

# bitsandbytes: elements from which a tensor has 8-bit moments, and elements of a moment that share a scale
EIGHT_BIT_FROM, BLOCK = 4096, 256
FLOAT32 = "32-true"  # Lightning's name of the precision
LATENT_ITEM = 2  # bytes of a latent's element in a pool: float16
CHECKPOINT_ITEM = 2  # likewise of a weight in a single file
CHECKPOINTS = 3  # on disk at once: the best, the last, and the one being written, if there are hard links


@dataclass(frozen=True)
class ModelStates:
    """Bytes of the model states (ZeRO's term), which are held during all of training; FSDP shards them."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    reference: int

    @property
    def parts(self) -> dict[str, int]:
        """{part: bytes}, without averaged weights where none are kept."""
        return {name: size for name, size in asdict(self).items() if size or name != "average"}

    @property
    def total(self) -> int:
        """Sum of all model states, in bytes."""
        return sum(self.parts.values())


def module_bytes(module: nn.Module) -> int:
    """Size of a module's parameters and buffers in bytes."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def trained_bytes(policy: nn.Module) -> int:
    """Size in bytes of the trained parameters, and so of their gradients, which have the same dtype."""
    return sum(p.nbytes for p in policy.parameters() if p.requires_grad)


def optimizer_bytes(policy: nn.Module, name: str) -> int:
    """Size in bytes of the optimizer's state: two moments per trained parameter.

    AdamW adds a step count of 4 bytes per parameter tensor; the 8-bit form adds a scale for each block.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    if name != ADAMW_8BIT:
        return sum(2 * p.nbytes + 4 for p in trained)
    return sum(
        2 * (p.numel() + 4 * math.ceil(p.numel() / BLOCK)) if p.numel() >= EIGHT_BIT_FROM else 8 * p.numel()
        for p in trained
    )


@cache
def _policy(blueprint: Blueprint, lora: Adapter | None, frozen_in: str) -> nn.Module:
    """Policy that callers share, and so must not change (`policy_module`)."""
    return policy_module(blueprint, lora, frozen_in)


@cache
def parameters(blueprint: Blueprint, lora: Adapter | None) -> tuple[int, int]:
    """Count the parameters of the base's denoiser, and the parameters that are trained."""
    policy = _policy(blueprint, lora, FLOAT32)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return sum(p.numel() for p in policy.parameters()) - (trained if lora else 0), trained


@cache
def model_states(
    blueprint: Blueprint,
    lora: Adapter | None,
    precision: str,
    optimizer: str,
    reference: bool,
    shards: int = 1,
    frozen_in: str = FLOAT32,
    moving: bool = False,
    averaged: bool = False,
) -> ModelStates:
    """Compute the model states that training keeps on each device.

    Args:
        blueprint: the pipeline.
        lora: the adapter, or None to train all weights.
        precision: Lightning's name of the training precision.
        optimizer: name of the optimizer.
        reference: whether the objective needs a reference, stored as by
            `capo.backbones.Backbone.reference`. With LoRA the reference is the policy without its
            adapter.
        shards: number of devices that share the states.
        frozen_in: precision for which the weights that LoRA freezes are stored.
        moving: whether the reference follows the policy: averages of the trained weights, and no network.
        averaged: whether averaged weights are kept, to be validated and exported.
    """
    policy = _policy(blueprint, lora, frozen_in)
    kept = trained_bytes(policy) if moving else 0
    if reference and not lora and not moving:
        kept = module_bytes(half_stored(blueprint.module(blueprint.denoiser_name), precision))
    trained = trained_bytes(policy)
    average = trained if averaged else 0
    whole = (module_bytes(policy), trained, optimizer_bytes(policy, optimizer), average, kept)
    return ModelStates(*(math.ceil(part / shards) for part in whole))


@cache
def drawing_bytes(blueprint: Blueprint, lora: Adapter | None, precision: str, itemsize: int = 4) -> int:
    """Size in bytes of a network that draws, its weights of `itemsize` bytes stored for the precision."""
    network = policy_module(blueprint, lora)
    if itemsize != 4:  # loaded in half precision throughout
        return module_bytes(nn.Module.to(network, torch.float16))
    return module_bytes(half_stored(network, precision))


@cache
def _numbers(blueprint: Blueprint) -> dict[str, int]:
    return {
        name: sum(p.numel() for p in blueprint.module(name).parameters())
        for name in sorted(blueprint.configs)
    }


@cache
def autocast_copies(blueprint: Blueprint, lora: Adapter | None, precision: str) -> int:
    """Size in bytes of the half-precision copies of trained weights that autocast keeps in a forward pass."""
    return cast_bytes(_policy(blueprint, lora, FLOAT32), precision)


def pipeline_bytes(blueprint: Blueprint, itemsize: int) -> dict[str, int]:
    """Compute {component: bytes of its weights}, at `itemsize` bytes per parameter."""
    return {name: count * itemsize for name, count in _numbers(blueprint).items()}


def pool_bytes(blueprint: Blueprint, prompts: int, candidates: int, rewards: int, text_item: int) -> int:
    """Size of a pool on disk in bytes: float16 latents, scores, and each prompt's conditioning once.

    `rewards` is the number of rewards, and `text_item` the bytes per element of the stored embeddings.
    """
    text = text_item * sum(math.prod(shape) for shape in blueprint.text_shapes.values())
    image = LATENT_ITEM * math.prod(blueprint.latent_shape) + SCORE_BYTES * rewards
    return prompts * (text + candidates * image)


@cache
def checkpoint_bytes(blueprint: Blueprint, lora: Adapter | None, optimizer: str, averages: int = 0) -> int:
    """Size of one checkpoint in bytes: the policy, without what LoRA freezes, and the optimizer's state.

    `averages` is the number of averages of the trained weights that it holds as well: for export, and of a
    reference that follows the policy.
    """
    policy = _policy(blueprint, lora, FLOAT32)
    frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    own = sum(tensor.nbytes for name, tensor in policy.state_dict().items() if name not in frozen)
    return own + optimizer_bytes(policy, optimizer) + averages * trained_bytes(policy)

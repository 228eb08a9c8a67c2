"""What a run holds in memory and writes to disk, in bytes, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache

from torch import nn

from capo.backbones.precision import half_stored
from capo.data.stages import SCORE_BYTES
from capo.preflight.architecture import Blueprint
from capo.preflight.tracing import Adapter, cast_bytes, policy_module
from capo.runtime.optimizers import ADAMW_8BIT

EIGHT_BIT_FROM, BLOCK = (
    4096,
    256,
)  # bitsandbytes: smaller tensors keep float32 moments; a scale for each block of a moment
LATENT_ITEM = 2  # float16 in a pool
CHECKPOINTS = 3  # on disk at once: the best, the last, and the one that is being written


@dataclass(frozen=True)
class ModelStates:
    """What a device holds from the first step to the last, in bytes; FSDP gives each device its share."""

    weights: int
    gradients: int
    optimizer: int
    reference: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def module_bytes(module: nn.Module) -> int:
    """Parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def gradient_bytes(policy: nn.Module) -> int:
    """One gradient for each trained parameter, in its dtype."""
    return sum(p.nbytes for p in policy.parameters() if p.requires_grad)


def optimizer_bytes(policy: nn.Module, name: str) -> int:
    """Two moments of each trained parameter; AdamW keeps a step count of 4 bytes beside each pair of them."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    if name != ADAMW_8BIT:
        return sum(2 * p.nbytes + 4 for p in trained)
    return sum(
        2 * (p.numel() + 4 * math.ceil(p.numel() / BLOCK)) if p.numel() >= EIGHT_BIT_FROM else 8 * p.numel()
        for p in trained
    )


_policy = cache(policy_module)  # to be looked at


@cache
def parameters(blueprint: Blueprint, lora: Adapter | None) -> tuple[int, int]:
    """Parameters of the base's denoiser, and of those that are trained."""
    policy = _policy(blueprint, lora)
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
    frozen_in: str = "32-true",
) -> ModelStates:
    """What a run keeps on each device.

    `reference`: whether the objective needs one, stored as `capo.backbones.precision.frozen_reference` does; with LoRA the policy is it, adapter
    off, its frozen weights stored as for the precision `frozen_in`.
    """
    policy = _policy(blueprint, lora, frozen_in)
    kept = 0
    if reference and not lora:
        kept = module_bytes(half_stored(blueprint.module(blueprint.denoiser_name), precision))
    whole = (module_bytes(policy), gradient_bytes(policy), optimizer_bytes(policy, optimizer), kept)
    return ModelStates(*(math.ceil(part / shards) for part in whole))


@cache
def _numbers(blueprint: Blueprint) -> dict[str, int]:
    return {
        name: sum(p.numel() for p in blueprint.module(name).parameters())
        for name in sorted(blueprint.configs)
    }


@cache
def autocast_copies(blueprint: Blueprint, lora: Adapter | None, precision: str) -> int:
    """Bytes of the policy's trained weights in half precision, which autocast keeps while a batch is trained on or images are drawn."""
    return cast_bytes(_policy(blueprint, lora), precision)


def pipeline_bytes(blueprint: Blueprint, itemsize: int) -> dict[str, int]:
    """Component -> bytes of its weights in memory."""
    return {name: count * itemsize for name, count in _numbers(blueprint).items()}


def pool_bytes(blueprint: Blueprint, prompts: int, candidates: int, rewards: int, text_item: int) -> int:
    """A pool on disk: float16 latents, text once a prompt in the encoders' dtype, scores."""
    text = text_item * sum(math.prod(shape) for shape in blueprint.text_shapes.values())
    image = LATENT_ITEM * math.prod(blueprint.latent_shape) + SCORE_BYTES * rewards
    return prompts * (text + candidates * image)


@cache
def checkpoint_bytes(blueprint: Blueprint, lora: Adapter | None, optimizer: str) -> int:
    """One checkpoint: the policy but for what LoRA leaves frozen, and the optimizer's state."""
    policy = _policy(blueprint, lora)
    frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    return sum(
        tensor.nbytes for name, tensor in policy.state_dict().items() if name not in frozen
    ) + optimizer_bytes(policy, optimizer)

"""Trace a network with fake tensors (shapes without values) to count its FLOPs and activation memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from capo.backbones.lora import add_lora
from capo.backbones.models import Denoiser
from capo.backbones.precision import HALVES, PRODUCTS, half_stored
from capo.preflight.architecture import Blueprint

Adapter = tuple[tuple[str, Any], ...]  # sorted items of a LoRA's settings
# Autocast computes these in float32 on a GPU, but not on a CPU.
IN_FLOAT32 = (F.group_norm, F.layer_norm, F.softmax)


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *args, out_val: object = None, **kwargs
) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# Operations that multiply activations with each other -> function that counts their FLOPs.
WITHOUT_WEIGHTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    **{packet: flop_registry[packet] for packet in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)},
}


@dataclass(frozen=True)
class Forward:
    """Cost of one forward pass without gradients.

    Attributes:
        weight_flops: FLOPs of products with weights (linear layers, convolutions); a multiply-add counts as
            two.
        attention_flops: FLOPs of products of activations with each other.
        working: peak bytes of results alive at once besides weights and inputs, without kernels' own
            workspace.
    """

    weight_flops: int
    attention_flops: int
    working: int

    @property
    def flops(self) -> int:
        """FLOPs of all products."""
        return self.weight_flops + self.attention_flops


class Kept:
    """Count the bytes that autograd saves for the backward pass: each storage once, except those of `own`."""

    def __init__(self, own: Iterable[Tensor]):
        self._known = {_storage_key(tensor) for tensor in own}
        self._alive: list[Tensor] = []  # a freed storage's address could be reused by another storage
        self.bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        """Count a saved tensor and return it; the pack hook of `saved_tensors_hooks`."""
        key = _storage_key(tensor)
        if key not in self._known:
            self._known.add(key)
            self._alive.append(tensor)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def watch(self):
        """Return a context manager in which saved tensors are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Count(TorchDispatchMode):
    """Count FLOPs by kind, and the peak bytes of results alive at once besides the storages of `own`."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.weight_flops = self.attention_flops = 0
        self.now = self.most = 0
        self._own = [tensor.untyped_storage() for tensor in own]  # views of weights share these
        self._seen: weakref.WeakSet = weakref.WeakSet(self._own)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in WITHOUT_WEIGHTS:
            self.attention_flops += WITHOUT_WEIGHTS[packet](*args, **kwargs, out_val=found)
        elif packet in flop_registry:
            self.weight_flops += flop_registry[packet](*args, **kwargs, out_val=found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, size)
        return found

    def _free(self, size: int) -> None:
        self.now -= size


class _AsOnGpu(TorchFunctionMode):
    """Apply a GPU's autocast rules on a CPU: normalization and softmax in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in IN_FLOAT32 and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _imagined(module: nn.Module, precision: str, gpu: bool) -> Iterator[None]:
    """Make `module`, from the meta device, compute with fake tensors in Lightning's `precision`."""
    half = HALVES.get(precision)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # The tensors claim to be on the CPU, which has autocast and fused attention; the meta device has neither.
    module._apply(lambda tensor: FakeTensor(mode, tensor.detach(), torch.device("cpu")))
    with ExitStack() as stack:
        stack.enter_context(mode)
        if half is not None:
            stack.enter_context(torch.autocast("cpu", half))
            if gpu:
                stack.enter_context(_AsOnGpu())
        yield


def adapter_of(lora: Mapping[str, Any] | None) -> Adapter | None:
    """Convert {rank, alpha, seed, targets} to a hashable value, under which results can be cached."""
    return (
        None
        if lora is None
        else tuple((key, tuple(lora[key]) if key == "targets" else lora[key]) for key in sorted(lora))
    )


def policy_module(blueprint: Blueprint, lora: Adapter | None, frozen_in: str = "32-true") -> Denoiser:
    """Build the policy on the meta device: the denoiser, with an adapter if `lora` is given.

    With an adapter, the frozen weights are stored as for the precision `frozen_in`.
    """
    denoiser = blueprint.denoiser()
    if lora is None:
        return denoiser
    with torch.device("meta"):
        return add_lora(half_stored(denoiser, frozen_in), **dict(lora))


@cache
def denoiser_forward(blueprint: Blueprint, precision: str, gpu: bool) -> Forward:
    """Measure the frozen denoiser on one image; every figure scales with the number of images."""
    # Stored in half precision, because autocast's copies of weights do not scale with the number of images.
    denoiser = half_stored(blueprint.module(blueprint.denoiser_name).requires_grad_(False), precision)
    with _imagined(denoiser, precision, gpu):
        arguments = blueprint.inputs(1)
        return _measured(denoiser, lambda: denoiser(**arguments, return_dict=False))


@cache
def decoder_forward(blueprint: Blueprint) -> Forward:
    """Measure the VAE's decoder on one latent, in float32."""
    vae = blueprint.vae()
    with _imagined(vae, "32-true", False):
        latent = torch.empty(1, *blueprint.latent_shape)
        return _measured(vae, lambda: vae.decode(latent, return_dict=False))


def _measured(module: nn.Module, call: Callable[[], object]) -> Forward:
    with torch.no_grad(), _Count([*module.parameters(), *module.buffers()]) as count:
        call()
    return Forward(count.weight_flops, count.attention_flops, count.most)


@cache
def activation_bytes(
    blueprint: Blueprint,
    images: int,
    precision: str,
    gpu: bool,
    lora: Adapter | None = None,
    checkpointing: bool = False,
    frozen_in: str = "32-true",
) -> int:
    """Count the bytes that a forward pass of the policy saves for its backward pass.

    With gradient checkpointing these are the inputs of the blocks, plus the larger of two: what the largest
    block saves while it is recomputed, and the copies of weights that autocast keeps until the forward pass
    ends.
    """
    policy = policy_module(blueprint, lora, frozen_in).train()
    blocks: list[int] = []

    def block(module: nn.Module, *args):
        inner = Kept(own)
        with inner.watch():  # hides the block's saved tensors from `kept`, as a checkpoint does
            found = module(*args)
        blocks.append(inner.bytes)
        for tensor in tree_leaves(args):
            if isinstance(tensor, Tensor):
                kept.note(tensor)
        return found

    if checkpointing:
        policy.enable_gradient_checkpointing(block)
    with _imagined(policy, precision, gpu):
        own = [*policy.parameters(), *policy.buffers()]
        kept = Kept(own)
        with kept.watch():
            policy(**blueprint.inputs(images), return_dict=False)
    return kept.bytes + (max(max(blocks, default=0), cast_bytes(policy, precision)) if checkpointing else 0)


def cast_bytes(policy: nn.Module, precision: str) -> int:
    """Size in bytes of the half-precision copies of trained weights that autocast keeps in a forward pass."""
    if precision not in HALVES:
        return 0
    return sum(
        2 * p.numel()
        for module in policy.modules()
        if isinstance(module, PRODUCTS)
        for p in module.parameters(recurse=False)
        if p.requires_grad
    )

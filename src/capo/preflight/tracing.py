"""What a pass through a network computes and keeps, found with tensors that have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from capo.backbones.lora import add_lora
from capo.backbones.precision import HALVES, half_stored
from capo.preflight.architecture import Blueprint

Adapter = tuple[tuple[str, object], ...]  # the items of a LoRA's settings
PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)  # whose weights autocast takes in half precision
IN_FLOAT32 = (
    F.group_norm,
    F.layer_norm,
    F.softmax,
)  # what autocast computes in float32 on a GPU, but not on a CPU


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *args, out_val: object = None, **kwargs
) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# products of activations with each other, by operation
WITHOUT_WEIGHTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    **{packet: flop_registry[packet] for packet in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)},
}


@dataclass(frozen=True)
class Forward:
    """One forward pass without gradients.

    Attributes:
        weight_flops: of products with weights (linear layers, convolutions); a product and a sum are two.
        attention_flops: of products of activations with each other.
        working: bytes alive at once beside weights and inputs, at most; without what kernels take for themselves.
    """

    weight_flops: int
    attention_flops: int
    working: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.weight_flops + self.attention_flops


class Kept:
    """Counts the bytes that autograd keeps for the backward pass: each storage once, `own` ones not at all."""

    def __init__(self, own: Iterable[Tensor]):
        self._known = {_storage_key(tensor) for tensor in own}
        self._alive: list[Tensor] = []  # a storage that was freed would lend its address to the next one
        self.bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        """A hook of `saved_tensors_hooks`."""
        key = _storage_key(tensor)
        if key not in self._known:
            self._known.add(key)
            self._alive.append(tensor)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def watch(self):
        """Context in which what is kept is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Count(TorchDispatchMode):
    """Floating-point operations by kind, and the most bytes of results that were alive at once beside those of `own`."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.weight_flops = self.attention_flops = 0
        self.now = self.most = 0
        self._own = [tensor.untyped_storage() for tensor in own]  # which views of weights share
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
    """Autocast's rules of a GPU on a CPU: normalization and softmax in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in IN_FLOAT32 and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _imagined(module: nn.Module, precision: str, gpu: bool) -> Iterator[None]:
    """`module`, on the meta device before, computes in Lightning's `precision` with values that nobody knows."""
    half = HALVES.get(precision)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # said to lie on a device that has autocast and fused attention, which meta has not
    module._apply(lambda tensor: FakeTensor(mode, tensor.detach(), torch.device("cpu")))
    with ExitStack() as stack:
        stack.enter_context(mode)
        if half is not None:
            stack.enter_context(torch.autocast("cpu", half))
            if gpu:
                stack.enter_context(_AsOnGpu())
        yield


def _cast(arguments: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Arguments with their floating-point tensors in `dtype`."""

    def one(value: object) -> object:
        if isinstance(value, dict):
            return _cast(value, dtype)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in arguments.items()}


def adapter_of(lora: Mapping[str, object] | None) -> Adapter | None:
    """{rank, alpha, seed, targets} as a value that results can be kept by."""
    return (
        None
        if lora is None
        else tuple((key, tuple(lora[key]) if key == "targets" else lora[key]) for key in sorted(lora))
    )


def policy_module(blueprint: Blueprint, lora: Adapter | None, frozen_in: str = "32-true") -> nn.Module:
    """The denoiser as it is tuned, on the meta device: all of it, or with an adapter, its frozen weights stored as for the precision `frozen_in`."""
    denoiser = blueprint.module(blueprint.denoiser_name)
    if lora is None:
        return denoiser
    with torch.device("meta"):
        return add_lora(half_stored(denoiser, frozen_in), **dict(lora))


@cache
def denoiser_forward(blueprint: Blueprint, precision: str, gpu: bool) -> Forward:
    """One image through the frozen denoiser; of more images every figure is a multiple."""
    # stored in half, because copies that autocast would make are no multiple of the images
    denoiser = half_stored(blueprint.module(blueprint.denoiser_name).requires_grad_(False), precision)
    with _imagined(denoiser, precision, gpu):
        arguments = _cast(blueprint.inputs(1), torch.float32)
        return _measured(denoiser, lambda: denoiser(**arguments, return_dict=False))


@cache
def decoder_forward(blueprint: Blueprint) -> Forward:
    """One latent through the VAE's decoder, in float32."""
    vae = blueprint.module("vae")
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
    """Bytes that a forward pass of the policy keeps for its backward pass, and with checkpointing what that makes again.

    With gradient checkpointing: the inputs of the blocks, and on top of them the larger of what the largest block keeps while it
    is computed again, and the copies of the weights that autocast keeps until the forward pass has ended.
    """
    policy = policy_module(blueprint, lora, frozen_in).train()
    blocks: list[int] = []

    def block(module: nn.Module, *args):
        inner = Kept(own)
        with inner.watch():  # which keeps what is inside from `kept`, as a checkpoint does
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
            policy(**_cast(blueprint.inputs(images), torch.float32), return_dict=False)
    return kept.bytes + (max(max(blocks, default=0), cast_bytes(policy, precision)) if checkpointing else 0)


def cast_bytes(policy: nn.Module, precision: str) -> int:
    """What autocast keeps of a policy's trained weights in half precision during a forward pass."""
    if precision not in HALVES:
        return 0
    return sum(
        2 * p.numel()
        for module in policy.modules()
        if isinstance(module, PRODUCTS)
        for p in module.parameters(recurse=False)
        if p.requires_grad
    )

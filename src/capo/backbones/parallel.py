"""Place a denoiser for training: compile its repeated blocks, move it to a device, or shard it (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from capo.backbones.execution import Execution


def repeated_blocks(denoiser: nn.Module, kind: str = "_repeated_blocks") -> list[nn.Module]:
    """List the denoiser's blocks of the classes that its attribute `kind` names, inner blocks first.

    `kind` is "_repeated_blocks" (blocks worth compiling) or "_no_split_modules" (blocks to keep on one
    device); without the first attribute the second is used.
    """
    whole: Any = denoiser._no_split_modules
    names = getattr(denoiser, kind, None) or whole
    return [module for module in reversed(list(denoiser.modules())) if type(module).__name__ in names]


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile each repeated block on its own.

    Compiling a whole network would fuse operations differently in policy and reference.
    """
    for block in repeated_blocks(denoiser):
        block.compile()


def lay_out(network: nn.Module, *, channels_last: bool, compiled: bool) -> None:
    """Give a network's convolutions the channels-last memory format, and compile its blocks, in place."""
    if channels_last:
        # torch's overloads lack this form
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if compiled:
        compile_blocks(network)


def shard(denoiser: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the denoiser over `mesh` with FSDP2: each process keeps a part of every weight.

    A block's weights are gathered when it runs. Sharding keeps the weights' own dtype and leaves mixed
    precision to autocast, so that policy and reference round alike and norms are computed in float32.
    """
    for block in repeated_blocks(denoiser, "_no_split_modules"):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The root is resharded too: after sampling, which has no backward pass, its weights would stay gathered.
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)


def place(network: nn.Module, execution: Execution, device: torch.device, mesh: DeviceMesh | None) -> None:
    """Prepare a network for `execution`, in place, and move it to `device` or shard it over `mesh`."""
    lay_out(network, channels_last=execution.channels_last, compiled=execution.compile)
    if mesh is None:
        network.to(device)
    else:  # sharding moves the network, block by block
        shard(network, mesh["data_parallel"])

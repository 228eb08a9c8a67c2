"""A denoiser's repeated blocks: compiled one by one, and sharded over devices (FSDP2)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def repeated_blocks(denoiser: nn.Module, kind: str = "_repeated_blocks") -> list[nn.Module]:
    """The denoiser's blocks of the classes that it names itself, inner ones first.

    `kind`: "_repeated_blocks", what is worth compiling, or "_no_split_modules", what lies on a device as a whole; a
    denoiser without the first has the second.
    """
    names = getattr(denoiser, kind, None) or denoiser._no_split_modules
    return [module for module in reversed(list(denoiser.modules())) if type(module).__name__ in names]


def compile_blocks(denoiser: nn.Module) -> None:
    """torch.compile of each repeated block by itself: of a whole network it would fuse policy and reference differently."""
    for block in repeated_blocks(denoiser):
        block.compile()


def shard(denoiser: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 over `mesh`: each process keeps a part of every weight and collects a block's when it computes it.

    In the weights' own dtype, with autocast above it: policy and reference then round alike, norms in float32.
    """
    for block in repeated_blocks(denoiser, "_no_split_modules"):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # the root too: after sampling, which has no backward pass, its weights would stay collected
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)

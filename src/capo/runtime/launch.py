"""Which process of a launch this one is, and its share of a step's pairs."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capo.errors import InputError
from capo.runtime.optimizers import ADAMW_8BIT

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started: `rank` of `world_size`, and `local_rank` of `local_world_size` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def machines(self) -> int:
        """How many machines take part."""
        return self.world_size // self.local_world_size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


@functools.cache
def cluster() -> ClusterEnvironment | None:
    """Torchrun's or SLURM's environment; None for a process that was started alone.

    Jobs that SLURM interrupts are begun again by their own script: the same command goes on.
    """
    if not ("TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1):
        return None  # before Lightning is imported, which takes seconds
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        return SLURMEnvironment(auto_requeue=False)
    return None


def launch() -> Launch:
    """What the launcher says of this process; alone: the only one of one."""
    here = cluster()
    if here is None:
        return Launch()
    told = (
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("SLURM_NTASKS_PER_NODE")
        or os.environ.get("SLURM_TASKS_PER_NODE", "")
    )
    tasks = re.match(r"\d+", told)  # SLURM writes 8, or 8(x2) for two machines
    return Launch(
        here.global_rank(),
        here.world_size(),
        here.local_rank(),
        int(tasks[0]) if tasks else here.world_size(),
    )


AUTO, DDP, FSDP = "auto", "ddp", "fsdp"


STRATEGIES = (AUTO, DDP, FSDP)


@dataclass(frozen=True)
class Division:
    """How the pairs of an optimizer step are shared out: `devices` x `micro_batch` pairs at a time, `accumulate` times."""

    devices: int
    micro_batch: int
    accumulate: int

    def __str__(self) -> str:
        devices = "1 device" if self.devices == 1 else f"{self.devices} devices"
        return f"{devices} x {self.micro_batch} pairs x {self.accumulate} accumulated"


def divide(batch: int, devices: int, micro_batch: int | None = None) -> Division:
    """`batch` pairs a step over `devices`, `micro_batch` in a forward pass (None: all that a device gets).

    Raises InputError where that does not come out whole.
    """
    given = micro_batch or max(1, batch // devices)
    accumulate, left = divmod(batch, devices * given)
    if left or not accumulate:
        each = [n for n in range(1, batch // devices + 1) if batch % (devices * n) == 0]
        remedy = (
            f"trainer.micro_batch can be {', '.join(map(str, each))}"
            if each
            else "make trainer.batch a multiple of the devices"
        )
        raise InputError(
            f"trainer.batch={batch} is no multiple of {devices} devices x {given} pairs "
            f"(trainer.micro_batch={micro_batch or 'null'}): {remedy}"
        )
    return Division(devices, given, accumulate)


def device_count(devices: int | str | Sequence[int]) -> int | None:
    """How many devices `trainer.devices` names; None where it leaves that open (auto, -1)."""
    if devices in ("auto", -1):
        return None
    if isinstance(devices, str):
        return len(devices.split(","))
    return devices if isinstance(devices, int) else len(devices)


def check_launch(here: Launch, strategy: str, devices: int | str | Sequence[int], num_nodes: int) -> None:
    """InputError where the processes that were started are not those of the configuration: one a device."""
    count = device_count(devices)
    if here.world_size == 1 and (count or 1) * num_nodes > 1:
        raise InputError(
            f"trainer.devices={devices} on {num_nodes} machines, and this process is alone: one process a device is started with "
            f"torchrun --nproc-per-node {count or 'N'} train.py trainer={strategy if strategy != AUTO else DDP} ... hydra.run.dir=DIR"
        )
    if here.world_size > 1 and count not in (None, here.local_world_size):
        raise InputError(
            f"trainer.devices={devices}, and {here.local_world_size} processes were started on this machine: say trainer=ddp or "
            f"trainer=fsdp, which take as many devices as there are processes, or trainer.devices={here.local_world_size}"
        )
    if here.world_size > 1 and num_nodes != here.machines:
        raise InputError(
            f"trainer.num_nodes={num_nodes}, and {here.world_size} processes, {here.local_world_size} a machine, were started: "
            f"give trainer.num_nodes={here.machines}"
        )


def check_fsdp(strategy: str, precision: str, optimizer: str, channels_last: bool) -> None:
    """InputError for what FSDP2 does not go with."""
    refused = {
        "trainer.channels_last=true": channels_last,
        "trainer.optimizer=adamw_8bit": optimizer == ADAMW_8BIT,
        "trainer.precision=16-mixed": precision == "16-mixed",
    }
    if strategy == FSDP and (found := [name for name, given in refused.items() if given]):
        raise InputError(
            f"trainer.strategy=fsdp does not go with {', '.join(found)}: leave it out, or choose trainer=ddp"
        )

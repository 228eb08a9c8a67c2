"""Rank and world size of this process, and the division of a step's pairs over devices."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capo.errors import InputError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that a launcher started.

    Attributes:
        rank: index among all processes.
        world_size: number of all processes.
        local_rank: index among the processes of this machine.
        local_world_size: number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def machines(self) -> int:
        """Number of machines."""
        return self.world_size // self.local_world_size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes files and prints."""
        return self.rank == 0


ELASTIC = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")  # set by torchrun
SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


@functools.cache
def cluster() -> ClusterEnvironment | None:
    """Return the environment of torchrun or SLURM, or None for a process that was started without a launcher.

    SLURM's automatic requeue is off: the job's own script runs the same command again, which resumes the run.
    Raises InputError for a variable of a launcher that is no number, and for the world size of another one:
    each of its processes would train by itself.
    """
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    names = ELASTIC if elastic else SLURM
    for name in names:
        if not re.fullmatch(r"[0-9]{1,9}", os.environ.get(name, "0").strip()):
            raise InputError(
                f"the variable {name}={os.environ[name]}, which a launcher sets, is no whole number: unset "
                "it, or start with torchrun or srun"
            )
    if not (elastic or int(os.environ.get("SLURM_NTASKS", 1)) > 1):
        if (size := os.environ.get("WORLD_SIZE", "1").strip()) not in ("", "1"):
            raise InputError(
                f"the variable WORLD_SIZE={size} says that this is one of several processes, but neither "
                "torchrun nor srun has started it: start them with one of these, or unset it"
            )
        return None  # before Lightning is imported, which takes seconds
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        return SLURMEnvironment(auto_requeue=False)
    return None


def launch() -> Launch:
    """Return this process's place as the launcher set it; without a launcher, rank 0 of 1."""
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


AUTO, DDP, FSDP = "auto", "ddp", "fsdp"  # strategies of training


@dataclass(frozen=True)
class Division:
    """Division of an optimizer step: `accumulate` times `micro_batch` pairs on each of `devices`."""

    devices: int
    micro_batch: int
    accumulate: int

    def __str__(self) -> str:
        devices = "1 device" if self.devices == 1 else f"{self.devices} devices"
        return f"{devices} x {self.micro_batch} pairs x {self.accumulate} accumulated"


def divide(batch: int, devices: int, micro_batch: int | None = None) -> Division:
    """Divide the `batch` pairs of a step over `devices`, `micro_batch` of them in a forward pass.

    `micro_batch` None: a device's whole share in one pass. `batch` must divide evenly; otherwise InputError
    names the possible micro-batches.
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
            f"trainer.batch={batch} is not a multiple of {devices} devices x {given} pairs "
            f"(trainer.micro_batch={micro_batch or 'null'}): {remedy}"
        )
    return Division(devices, given, accumulate)


def device_count(devices: int | str | Sequence[int]) -> int | None:
    """Return the number of devices that `trainer.devices` names, or None for auto and -1."""
    if devices in ("auto", -1):
        return None
    numbers = device_numbers(devices)
    return int(str(devices)) if numbers is None else len(numbers)


def device_numbers(devices: int | str | Sequence[int]) -> list[int] | None:
    """Return the numbers of the devices that `trainer.devices` names; None where it is a count or auto."""
    if isinstance(devices, str):
        return [int(number) for number in devices.split(",")] if "," in devices else None
    return None if isinstance(devices, int) else list(devices)


def check_launch(here: Launch, strategy: str, devices: int | str | Sequence[int], num_nodes: int) -> None:
    """Raise InputError unless the launcher started one process per device of the configuration."""
    count = device_count(devices)
    if here.world_size == 1 and (count or 1) * num_nodes > 1:
        raise InputError(
            f"trainer.devices={devices} on {num_nodes} machines needs one process per device, but this is "
            f"the only process: start with torchrun --nproc-per-node {count or 'N'} train.py "
            f"trainer={strategy if strategy != AUTO else DDP} ... hydra.run.dir=DIR"
        )
    if here.world_size > 1 and count not in (None, here.local_world_size):
        raise InputError(
            f"trainer.devices={devices}, but {here.local_world_size} processes were started on this machine: "
            "choose trainer=ddp or trainer=fsdp, which use one device per process, or "
            f"trainer.devices={here.local_world_size}"
        )
    if here.world_size > 1 and num_nodes != here.machines:
        raise InputError(
            f"trainer.num_nodes={num_nodes}, but {here.world_size} processes were started, "
            f"{here.local_world_size} per machine: set trainer.num_nodes={here.machines}"
        )


def check_fsdp(
    strategy: str, precision: str, optimizer: str, channels_last: bool, moving: bool = False
) -> None:
    """Raise InputError for settings that FSDP2 does not support, such as a `moving` reference."""
    from capo.runtime.optimizers import ADAMW_8BIT  # with torch, which a slip is answered without

    refused = {
        "trainer.channels_last=true": channels_last,
        "trainer.optimizer=adamw_8bit": optimizer == ADAMW_8BIT,
        "trainer.precision=16-mixed": precision == "16-mixed",
        # a pass gathers the policy's own shards, in whose place averaged weights cannot stand
        "a reference that follows the policy (reference=ema)": moving,
    }
    if strategy == FSDP and (found := [name for name, given in refused.items() if given]):
        raise InputError(
            f"trainer.strategy=fsdp does not support {', '.join(found)}: leave it out, or choose trainer=ddp"
        )

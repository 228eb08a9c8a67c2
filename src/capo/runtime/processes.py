"""Collective operations of a run's processes: the process group, gathering, and work of the first process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor, distributed

from capo.errors import InputError
from capo.runtime.launch import Launch, cluster, device_numbers, launch

# Long, because the others wait while the first process writes images and policies.
PATIENCE = timedelta(hours=2)
Value = TypeVar("Value")


def own_device(accelerator: str) -> torch.device:
    """Select and return this process's device: its own GPU, by its local rank, or the CPU.

    The CPU is used without a GPU, and with `accelerator` cpu. Raises InputError for more processes on this
    machine than it has GPUs.
    """
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    here, there = launch(), torch.cuda.device_count()
    if here.local_world_size > there:
        raise InputError(
            f"{here.local_world_size} processes were started on a machine with {there} "
            f"GPU{'s' if there > 1 else ''}: start at most one per GPU (torchrun --nproc-per-node {there} "
            "...), or choose trainer.accelerator=cpu"
        )
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    return device


def check_accelerator(accelerator: str) -> None:
    """Raise InputError if this machine has no accelerator of that name, one of Lightning's."""
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "tpu": find_spec("torch_xla") is not None,
    }
    found |= {"auto": True, "cpu": True, "gpu": found["cuda"] or found["mps"]}
    if not found[accelerator]:
        there = ", ".join(name for name in ("cuda", "mps", "tpu", "cpu") if found[name])
        raise InputError(
            f"trainer.accelerator={accelerator}: torch finds no such device here, but {there}; auto uses "
            "what there is"
        )


def check_devices(accelerator: str, devices: int | str | Sequence[int]) -> None:
    """Raise InputError if `devices` names GPUs by numbers that this machine lacks, or not the first ones.

    Images are drawn and scored on a process's own GPU (`own_device`), on which it must then train.
    """
    numbers = device_numbers(devices)
    if numbers is None:
        return
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = 0 if accelerator == "cpu" else torch.cuda.device_count() if cuda else int(mps)
    if not there:
        raise InputError(
            f"trainer.devices={devices}: numbers name GPUs, but there is none to train on "
            f"(trainer.accelerator={accelerator}); give the number of devices, trainer.devices=1"
        )
    if any(number >= there for number in numbers) or len(set(numbers)) < len(numbers):
        raise InputError(
            f"trainer.devices={devices}: the GPUs of this machine are 0 to {there - 1}; name each at most "
            "once, or give the number of devices, trainer.devices=1"
        )
    if sorted(numbers) != list(range(len(numbers))):
        seen = ",".join(map(str, numbers))
        raise InputError(
            f"trainer.devices={devices}: training would use other GPUs than drawing and scoring, which take "
            f"the first ones: start with CUDA_VISIBLE_DEVICES={seen}, and give trainer.devices={len(numbers)}"
        )


@contextmanager
def process_group(cuda: bool) -> Iterator[Launch]:
    """Join the process group for the block; with one process, do nothing.

    After an error the group is not destroyed, because that would wait for the other processes: this process
    ends, and the launcher ends the others.
    """
    here, environment = launch(), cluster()
    if environment is None or here.world_size == 1:
        yield here
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (
        environment.main_address,
        str(environment.main_port),
    )
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, rank=here.rank, world_size=here.world_size, timeout=PATIENCE)
    yield here
    leave_group()


def leave_group() -> None:
    """Wait for all processes, then destroy the process group; without a group, do nothing."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def gathered(value: Value) -> list[Value]:
    """Gather every process's `value` into a list, ordered by rank."""
    if not distributed.is_initialized():
        return [value]
    values: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, each of which must call it; nothing leaves the device."""
    if not distributed.is_initialized():
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def run_on_first_process(task: Callable[[], Value]) -> Value:
    """Run `task` on the first process and return its result on all; an InputError there is raised on all."""
    if not distributed.is_initialized():
        return task()
    told: list = [None, None]
    if distributed.get_rank() == 0:
        try:
            told[0] = task()
        except InputError as error:
            told[1] = str(error)
    distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise InputError(told[1])
    return told[0]

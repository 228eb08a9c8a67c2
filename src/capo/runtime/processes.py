"""Collective operations of a run's processes: the process group, gathering, and work of the first process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from capo.errors import InputError
from capo.runtime.launch import Launch, cluster, launch

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

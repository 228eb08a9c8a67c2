"""The processes of one run: which of them this one is, what they tell each other, and what only the first of them does."""

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

PATIENCE = timedelta(
    hours=2
)  # for the slowest process: the first one writes pictures and policies while the others wait
Value = TypeVar("Value")


@contextmanager
def process_group(cuda: bool) -> Iterator[Launch]:
    """Within the block the processes can talk to each other; this one's device is the current one. Alone, nothing happens.

    After an error the group is not left in order, since that would wait for the others: this process ends, and so do they.
    """
    here, environment = launch(), cluster()
    if cuda and here.world_size > 1:
        torch.cuda.set_device(here.local_rank)
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
    """End the conversation, once all have come here; from then on each process is alone. Alone, nothing happens."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def gathered(value: Value) -> list[Value]:
    """Every process's `value`, in the order of their ranks."""
    if not distributed.is_initialized():
        return [value]
    values: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def run_on_first_process(task: Callable[[], Value]) -> Value:
    """What `task` gives to the first process, in all of them; an InputError there is one everywhere."""
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

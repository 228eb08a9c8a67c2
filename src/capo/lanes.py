"""How the threads of a CPU share work: all on one operation at a time, or each on a batch of its own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part, Result = TypeVar("Part"), TypeVar("Result")
OPERATIONS, BATCHES = "operations", "batches"


def in_lanes(function: Callable[[Part], Result], parts: Iterable[Part], parallel: str, device: torch.device) -> list[Result]:
    """[function(part) for part in parts].

    With `parallel` "batches" on a CPU as many parts at a time as this process has torch threads, one thread each: small
    networks spend their time in operations too short to be worth sharing out. What comes out is then the same, bit for bit,
    whatever the number of threads. With "operations", and on any other device, one part after another.
    """
    threads = torch.get_num_threads()
    if parallel == OPERATIONS or device.type != "cpu":
        return [function(part) for part in parts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(threads)  # a lane's setting is every later thread's too

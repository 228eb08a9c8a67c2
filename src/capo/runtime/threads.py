"""How the threads of a CPU share work: all on one operation at a time, or each on a batch of its own."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part, Result = TypeVar("Part"), TypeVar("Result")
OPERATIONS, BATCHES = "operations", "batches"


def map_batches(
    function: Callable[[Part], Result], parts: Iterable[Part], parallel: str, device: torch.device
) -> list[Result]:
    """[function(part) for part in parts].

    With `parallel` "batches" on a CPU as many parts at a time as this process has torch threads, one thread each: small
    networks spend their time in operations too short to be worth sharing out. What comes out is then the same, bit for bit,
    whatever the number of threads. With "operations", and on any other device, one part after another.
    """
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    if parallel == OPERATIONS or device.type != "cpu":
        return [function(part) for part in parts]

    def lane(part: Part) -> Result:
        with torch.set_grad_enabled(gradients):  # which every thread has for itself
            return function(part)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lane, parts))
    finally:
        torch.set_num_threads(threads)  # a lane's setting is every later thread's too


def over_rows(function: Callable[[slice], None], rows: int, least: int, device: torch.device) -> None:
    """function(slice) for slices that cover range(rows): one a thread of a CPU, each of `least` rows or more."""
    lanes = min(torch.get_num_threads(), rows // least) if device.type == "cpu" else 1
    if lanes < 2:
        function(slice(0, rows))
        return
    size = math.ceil(rows / lanes)
    map_batches(
        function, [slice(start, min(start + size, rows)) for start in range(0, rows, size)], BATCHES, device
    )

"""Two ways for CPU threads to share work: all on one operation at a time, or each on its own batch."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")
OPERATIONS, BATCHES = "operations", "batches"


def map_batches(
    function: Callable[[Part], Result], parts: Iterable[Part], parallel: str, device: torch.device
) -> list[Result]:
    """Return [function(part) for part in parts], computed in parallel or one part after another.

    With `parallel` "batches" on a CPU, as many parts run at a time as this process has torch threads, each on
    one thread. This is faster for small networks, whose operations are too short to be split over threads,
    and the results are bitwise the same for any number of threads. With "operations", and on any other
    device, the parts run one after another.
    """
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    if parallel == OPERATIONS or device.type != "cpu":
        return [function(part) for part in parts]

    def lane(part: Part) -> Result:
        with torch.set_grad_enabled(gradients):  # gradient mode is local to a thread
            return function(part)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lane, parts))
    finally:
        torch.set_num_threads(threads)  # the workers' setting would hold for every later thread too


def over_rows(function: Callable[[slice], None], rows: int, least: int, device: torch.device) -> None:
    """Call `function` on slices that cover range(rows): one per CPU thread, each of at least `least` rows."""
    lanes = min(torch.get_num_threads(), rows // least) if device.type == "cpu" else 1
    if lanes < 2:
        function(slice(0, rows))
        return
    size = math.ceil(rows / lanes)
    map_batches(
        function, [slice(start, min(start + size, rows)) for start in range(0, rows, size)], BATCHES, device
    )

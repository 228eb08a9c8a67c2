"""Two ways for CPU threads to share work: all on one operation at a time, or each on its own batch."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Half = TypeVar("Half")
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
    if not shares_batches(parallel, device):
        return [function(part) for part in parts]

    def lane(part: Part) -> Result:
        with torch.set_grad_enabled(gradients):  # gradient mode is local to a thread
            return function(part)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lane, parts))
    finally:
        torch.set_num_threads(threads)  # the workers' setting would hold for every later thread too


def shares_batches(parallel: str, device: torch.device) -> bool:
    """Whether `map_batches` works on several parts at a time."""
    return parallel == BATCHES and device.type == "cpu"


def map_ahead(
    first: Callable[[Part], Half],
    second: Callable[[Part, Half], Result],
    parts: Iterable[Part],
    device: torch.device,
) -> list[Result]:
    """Return [second(part, first(part)) for part in parts], with `first` one part ahead in a thread.

    No more than one result of `first` waits for `second`, which runs in the thread of the caller.
    """
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(threads)
        if device.type == "cuda" and device.index is not None:  # the current device is local to a thread
            torch.cuda.set_device(device)

    def ahead(part: Part) -> Half:
        with torch.set_grad_enabled(gradients):
            return first(part)

    found: list[Result] = []
    with ThreadPoolExecutor(1, initializer=begin) as thread:
        before: tuple[Part, Future[Half]] | None = None
        for part in parts:
            after = part, thread.submit(ahead, part)
            if before is not None:
                found.append(second(before[0], before[1].result()))
            before = after
        if before is not None:
            found.append(second(before[0], before[1].result()))
    return found


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

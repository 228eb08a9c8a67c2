"""Timing of jobs in turn, round by round, so that a temporary slowdown of the machine affects all of them."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def in_turn(
    jobs: Mapping[Name, Callable[[], object]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, list[float]]:
    """Seconds of `runs` calls of every job by `clock`, after one warm-up call of each.

    The job that begins changes from round to round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for run in range(-1, runs):
        first = run % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            jobs[name]()
            if run >= 0:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of the ratio others / seconds: how many times as long the others took."""
    return statistics.median(other / own for own, other in zip(seconds, others, strict=True))


def print_rates(seconds: Mapping[str, Sequence[float]], amount: float, unit: str, ours: str) -> None:
    """Print a row per job: its median rate, `amount` units per call, and how many times as fast `ours` is."""
    width = max(map(len, seconds))
    print(f"{'':<{width}}  {unit + '/s':>12}  {'ours is':>8}")
    for name, found in seconds.items():
        rate, ratio = amount / statistics.median(found), median_ratio(seconds[ours], found)
        print(f"{name:<{width}}  {rate:>12.1f}  {ratio:>6.2f} x", flush=True)

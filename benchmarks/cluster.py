"""Simulate the filling of a pool on a cluster: how busy its devices are, and what the driver costs.

    python -m benchmarks.cluster [--shards 1000] [--devices 1 8 64] [--failures 0.01]

The schedule of `engine=ray` runs in simulated time, with workers whose times are those of a plan: `--seconds`
of a shard by stage, which follow from the hours of `plan=true` (times the devices, divided by the shards).
Compared are

- the critical path: no device ever waits, and nothing is lost;
- `engine=ray`: the schedule as it is;
- `engine=local` under a launcher that starts all processes again when one fails (torchrun --max-restarts):
  the stages follow each other, and a failure costs what all devices have begun, and their start.

With `engine=ray` a failure costs half of its task and the start of one worker. The driver's time is real:
processor time of the schedule by file, without Ray's own calls.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections.abc import Mapping, Sequence

from benchmarks.simulated_cluster import STAGES, SimulatedCluster, chain
from capo.data.engines.schedule import Room, Schedule, Task, Worker
from capo.runtime.options import number, whole_number

SECONDS = {"text": 2.0, "latents": 600.0, "scores": 120.0}
JITTER = 0.2  # a task takes up to this share more or less than its stage's time
HEAD = "devices  ideal h   ray h  utilized  local h  utilized  lost  failed  starts  driver ms/file"
ROW = "{:7d} {:8.2f} {:7.2f} {:8.1%} {:8.2f} {:8.1%} {:6d} {:6d} {:7d} {:12.3f}"


class Failures:
    """Tasks fail at a rate, and take their worker with them."""

    def __init__(self, rate: float):
        self.rate, self.random, self.count = rate, random.Random(1), 0

    def __call__(self, worker: Worker | None, task: Task | None) -> tuple[str, bool, bool] | None:
        if task is None or self.random.random() >= self.rate:
            return None
        self.count += 1
        return "its worker died", False, True


def stage_by_stage(cluster: SimulatedCluster, shards: int) -> float:
    """Seconds of the local engine under a launcher, on such a cluster with such failures."""
    now = 0.0
    for tasks in chain(shards).values():
        left, running = list(tasks), []
        now += cluster.start_seconds  # the models of the stage
        while left or running:
            while left and len(running) < cluster.size:
                task = left.pop()
                failed = cluster.fault(Worker(task.stage), task) is not None
                end = now + cluster.duration(task.stage) * (0.5 if failed else 1)
                heapq.heappush(running, (end, id(task), failed, task))
            now, _, failed, task = heapq.heappop(running)
            if failed:
                left += [task, *(entry[3] for entry in running)]
                running, now = [], now + cluster.start_seconds
    return now


def simulate(devices: int, shards: int, seconds: Mapping[str, float], start: float, rate: float) -> list:
    """Return the figures of a row, in the order of HEAD."""
    failures = Failures(rate)
    cluster = SimulatedCluster(devices, seconds, start, failures, JITTER)
    rooms = {"text": Room(1, 1), "latents": Room(), "scores": Room()}
    began = time.process_time()
    failed = Schedule(chain(shards), rooms, cluster).run()
    spent = time.process_time() - began
    ideal = sum(seconds.values()) * shards / devices
    local = stage_by_stage(SimulatedCluster(devices, seconds, start, Failures(rate), JITTER), shards)
    used = [cluster.now / 3600, ideal / cluster.now, local / 3600, ideal / local]
    driver = 1e3 * spent / (len(STAGES) * shards)
    return [devices, ideal / 3600, *used, failures.count, len(failed), cluster.starts, driver]


def stage_seconds(text: str) -> tuple[str, float]:
    """Type of an option: STAGE=SECONDS, else argparse's message."""
    name, _, value = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"{text!r} must be STAGE=SECONDS, of {', '.join(STAGES)}")
    return name, number(zero=False)(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each number of devices."""
    parser = argparse.ArgumentParser(description="Simulate the filling of a pool on a cluster.")
    parser.add_argument("--shards", type=whole_number(), default=1000)
    parser.add_argument("--devices", type=whole_number(), nargs="+", default=[1, 8, 64])
    parser.add_argument("--failures", type=number(below=1), default=0.01, help="share of tasks that fail")
    parser.add_argument("--start", type=number(), default=60.0, help="seconds until a worker is ready")
    told = "of a shard, as STAGE=SECONDS; default " + " ".join(f"{k}={v:g}" for k, v in SECONDS.items())
    parser.add_argument("--seconds", type=stage_seconds, nargs="+", default=[], help=told)
    options = parser.parse_args(arguments)
    seconds = SECONDS | dict(options.seconds)
    print(
        f"{options.shards} shards, seconds {seconds}, {options.failures:.1%} fail, start {options.start:g} s"
    )
    print(HEAD)
    for devices in options.devices:
        row = simulate(devices, options.shards, seconds, options.start, options.failures)
        print(ROW.format(*row), flush=True)


if __name__ == "__main__":
    main()

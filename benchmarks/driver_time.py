"""Processor time of the driver of `engine=ray`, with workers that compute nothing."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from capo.data.engines import ray_cluster
from capo.data.engines.ray_cluster import RayCluster, connect
from capo.data.engines.schedule import Room, Schedule, Task, Worker

LOOKS = 200


class Clock:
    """Seconds since it was made."""

    def __init__(self):
        self._began = time.thread_time(), time.process_time(), time.perf_counter()

    def passed(self) -> tuple[float, float, float]:
        """Processor seconds of this thread, and of all other threads, and seconds of wall time."""
        now = time.thread_time(), time.process_time(), time.perf_counter()
        own, process, wall = (after - before for after, before in zip(now, self._began, strict=True))
        return own, process - own, wall


def driver_alone(files: int, workers: int) -> tuple[float, float, float]:
    """Measure the driver.

    Returns:
        Milliseconds a file of `files` tasks that take no time, of its own thread and of all its threads; and
        milliseconds of its own thread each time that it looks after its workers while nothing happens.
    """
    ray = connect("local", num_cpus=workers)
    rooms = {"latents": Room(1, workers)}

    class Idle:  # here, for Ray to send it whole: a worker need not import what this module does
        def load(self) -> tuple[str, bool]:
            return "", False

        def make(self, shard: Any) -> tuple[str, bool]:
            time.sleep(shard.seconds)
            return "", False

    def start(stage: str, options: dict[str, Any]) -> Any:
        return ray.remote(**options)(Idle).remote()

    def task(number: int, seconds: float = 0.0) -> Task:
        return Task("latents", SimpleNamespace(name=f"{number:05d}", seconds=seconds), number)

    try:
        cluster = RayCluster(ray, start, rooms, 1, 600.0)
        began = Clock()
        if failed := Schedule(
            {"latents": [task(number) for number in range(files)]}, rooms, cluster, 1
        ).run():
            raise RuntimeError(next(iter(failed.values())))
        own, others, _ = began.passed()
        look = _look(cluster, task(files, 600.0))
    finally:
        ray.shutdown()
    return 1e3 * own / files, 1e3 * (own + others) / files, 1e3 * look


def _look(cluster: RayCluster, task: Task) -> float:
    """Seconds of this thread for each return of a wait for a worker, in which its task goes on."""
    worker = Worker(task.stage)
    cluster.start(worker)
    while not cluster.wait():
        pass
    cluster.submit(worker, task)
    with patch.object(ray_cluster, "PULSE", 0.01):
        began = Clock()
        for _ in range(LOOKS):
            cluster.wait()
            cluster.devices()
        own, _, _ = began.passed()
    cluster.stop(worker)
    return own / LOOKS

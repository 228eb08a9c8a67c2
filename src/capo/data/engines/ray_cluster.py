"""A Ray cluster, as a schedule sees it: joining it, its devices, and the workers that come and go."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from capo.data.engines.schedule import Event, Room, Task, Worker
from capo.errors import InputError, first_line

LOCAL = "local"  # address of a cluster of this machine alone
# read by Ray when it is imported; 0: its servers listen on the loopback address alone, on Linux too
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
NICENESS = "RAY_worker_niceness"  # read by Ray as it starts; its own 15 starves workers beside other work
STARTS = 3  # tries to start a local cluster: Ray gives up after 30 s, which a busy machine may need
REACHED = 10.0  # seconds within which a cluster's address must answer
MODEL = "accelerator_type:"  # how Ray's name for machines with a model of GPU begins
PULSE = 5.0  # seconds after which a wait returns, to look at the cluster's size and at late starts
log = logging.getLogger(__name__)


def require_package() -> None:
    """Raise InputError if the package `ray` is not installed."""
    if find_spec("ray") is None:
        raise InputError("engine=ray needs the extra `ray`: pip install -e '.[ray]'")


def connect(address: str, **options: Any) -> Any:
    """Join the cluster at `address`, or start a local one with `options` of `ray.init`; return the module.

    Raises InputError, with the remedy, without the package, the cluster, or its token.
    """
    require_package()
    if address == LOCAL:
        os.environ.setdefault(LOOPBACK, "0")
        os.environ.setdefault(NICENESS, "0")
    import ray  # pyright: ignore[reportMissingImports] - an extra

    if ray.is_initialized():
        return ray
    _reach(address)
    where: dict[str, Any] = {"address": address}
    if address == LOCAL:
        where |= {"include_dashboard": False, **options}
    for left in reversed(range(STARTS)):
        try:
            with _own_sigterm():
                ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
            return ray
        except Exception as error:  # Ray raises classes of its own, gRPC's and the standard library's
            if address == LOCAL and left:
                log.warning("Ray did not start (%s); it is tried again", first_line(error))
                continue
            raise InputError(_refused(address, error)) from error
    raise AssertionError


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray's ends it at once, training's keeps the last step first."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():  # elsewhere Ray sets none
        signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Raise InputError if nothing answers at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), REACHED).close()
    except (OSError, OverflowError) as error:
        raise InputError(_refused(address, error)) from error


def _refused(address: str, error: BaseException) -> str:
    text, cause = "", error
    while cause is not None:  # Ray says at the end of a chain what was wrong
        text, cause = text + str(cause), cause.__cause__ or cause.__context__
    if "token" in text.lower():
        return (
            f"engine.address={address}: the cluster does not take this process's token "
            f"({first_line(error)}): set RAY_AUTH_MODE=token here and on every machine, with one token in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    if address == LOCAL:
        return f"engine.address=local: Ray could not start here ({first_line(error)}); use engine=local"
    return (
        f"engine.address={address}: there is no Ray cluster ({first_line(error)}): start one with "
        "`ray start --head`, give its HOST:PORT, or engine.address=local for this machine alone"
    )


class RayCluster:
    """A Ray cluster as `Schedule` sees it; a device is a GPU, or, without any, `threads` cores.

    Args:
        ray: the module, connected.
        starts: starts an actor of a stage with options of `ray.remote`.
        rooms: stage -> what its workers take.
        threads: cores of a device without GPUs.
        start_limit: seconds within which an actor must be ready.
    """

    def __init__(
        self,
        ray: Any,
        starts: Callable[[str, dict[str, Any]], Any],
        rooms: Mapping[str, Room],
        threads: int,
        start_limit: float,
    ):
        self._ray, self._starts, self._rooms = ray, starts, rooms
        self._threads, self._start_limit = threads, start_limit
        self._running: dict[Any, tuple[Worker, Task | None]] = {}  # reference -> what runs; no task: it loads
        self._begun: dict[Worker, float] = {}  # when those that load began to
        self._looked, self._devices = -PULSE, 0.0

    def check(self) -> None:
        """Raise InputError if a worker of some stage takes more devices than the cluster has.

        Warns of GPUs of several models: the bits of a file depend on the model that made it.
        """
        has = self.devices()
        models = [name for name in self._ray.cluster_resources() if name.startswith(MODEL)]
        if len(models) > 1:
            log.warning(
                "the Ray cluster has GPUs of several models (%s): a shard depends, by rounding, on the model "
                "that makes it, which its header names; for one model, give the pool a cluster of it alone",
                ", ".join(sorted(name.removeprefix(MODEL) for name in models)),
            )
        for stage, room in self._rooms.items():
            if room.devices > has:
                kind = "GPUs" if self._gpus() else f"times {self._threads} cores"
                raise InputError(
                    f"engine.{stage}.devices={room.devices:g}, but the Ray cluster has {has:g} {kind}; ask "
                    "for fewer, give fewer threads, or start more machines (ray start --address=HOST:PORT)"
                )

    def _gpus(self) -> float:
        return self._ray.cluster_resources().get("GPU", 0.0)

    def devices(self) -> float:
        """Number of devices, as it was `PULSE` seconds ago at most."""
        if (now := time.monotonic()) - self._looked >= PULSE:
            self._looked, there = now, self._ray.cluster_resources()
            self._devices = there.get("GPU", 0.0) or there.get("CPU", 0.0) // self._threads
        return self._devices

    def start(self, worker: Worker) -> None:
        share = self._rooms[worker.stage].devices
        options = {"num_cpus": share * self._threads}
        if self._gpus():
            options = {"num_cpus": 1, "num_gpus": share}
        worker.handle = self._starts(worker.stage, options)
        self._running[worker.handle.load.remote()] = worker, None
        self._begun[worker] = time.monotonic()

    def submit(self, worker: Worker, task: Task) -> None:
        self._running[worker.handle.make.remote(task.shard)] = worker, task

    def stop(self, worker: Worker) -> None:
        self._running = {ref: entry for ref, entry in self._running.items() if entry[0] is not worker}
        self._begun.pop(worker, None)
        self._ray.kill(worker.handle)

    def wait(self) -> Sequence[Event]:
        if not (running := list(self._running)):
            time.sleep(PULSE)  # no machine has room; one may come
            return []
        done, _ = self._ray.wait(running, timeout=PULSE)
        if done:
            done, _ = self._ray.wait(running, num_returns=len(running), timeout=0)
        return [*map(self._event, done), *self._late()]

    def _event(self, reference: Any) -> Event:
        worker, task = self._running.pop(reference)
        self._begun.pop(worker, None)
        try:
            error, final = self._ray.get(reference)
        except self._ray.exceptions.RayError as gone:
            return Event(worker, task, f"its worker's process ended ({first_line(gone)})", lost=True)
        return Event(worker, task, error, final)

    def _late(self) -> list[Event]:
        now = time.monotonic()
        message = (
            f"it was not ready within {self._start_limit:g} s (engine.start_limit): no machine had the room "
            "that the cluster tells of, or loading takes longer"
        )
        return [
            Event(worker, None, message, lost=True)
            for worker, began in self._begun.items()
            if now - began > self._start_limit
        ]

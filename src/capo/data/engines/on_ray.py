"""The engine that fills pools with workers on a Ray cluster; needs the extra `ray`.

This process is the driver: it decides which worker makes which shard (`Schedule`) and loads no model for it.
A worker is an actor that builds one stage, with no other parts of the pipeline than the stage needs. It makes
one shard at a time and writes its file itself; Ray moves names only. Actors end with their driver.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from capo.data.engines.local import run_stage
from capo.data.engines.schedule import Event, Room, Schedule, Task, Worker
from capo.data.pool import Shard
from capo.data.stages import Order, Stage
from capo.data.watching import current_watch
from capo.errors import InputError, Unfinished, first_line

Build = Callable[[Order], Stage]  # picklable; builds a stage where it runs
LOCAL, AUTO = "local", "auto"  # a cluster of this machine alone, the cluster that RAY_ADDRESS names
# read by Ray when it is imported; 0: its servers listen on the loopback address alone, on Linux too
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
STARTS = 3  # tries to start a local cluster: Ray gives up after 30 s, which a busy machine may need
PULSE = 1.0  # seconds after which a wait returns, to look at the cluster's size and at late starts
LISTED = 5  # failures named in the message; the log has all of them
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayEngine:
    """Fills pools with workers on a Ray cluster.

    Args:
        build: builds a stage in a worker.
        address: local (a cluster of this machine that ends with this process), auto, or HOST:PORT.
        attempts: how often a shard is tried.
        start_limit: seconds within which a worker must have loaded its models.
        threads: torch threads of a worker on the CPU.
        rooms: stage -> devices of a worker, and the most workers.
    """

    build: Build
    address: str = LOCAL
    attempts: int = 3
    start_limit: float = 1800.0
    threads: int = 1
    rooms: Mapping[str, Room] = field(default_factory=dict)

    def run(self, stages: Sequence[Stage], progress: bool = True) -> None:
        """Make all that the stages of one pool lack.

        Raises:
            InputError: if there is no such cluster, or if it has too few devices for a worker.
            Unfinished: if a shard failed `attempts` times, or could not be tried; the rest was done.
        """
        orders = {stage.name: stage.order() for stage in stages}
        for stage in stages:
            if orders[stage.name] is None:  # its input is on this machine alone
                run_stage(stage, progress)
        remote = [stage for stage in stages if orders[stage.name]]
        todo, made = _todo(remote), set()
        while any(todo.values()):
            self._make(remote, orders, todo, progress)
            made |= _names(todo)
            todo = _todo(remote)  # another process may have divided a row into other shards meanwhile
            if lost := sorted(made & _names(todo)):
                raise RuntimeError(
                    f"{lost[0]} in {remote[0].pool.folder} was written but is missing: the machines do not "
                    "see one folder, or its disk does not keep files; check it, or use another pool.root"
                )

    def _make(
        self,
        stages: Sequence[Stage],
        orders: Mapping[str, Order | None],
        todo: Mapping[str, Sequence[Shard]],
        progress: bool,
    ) -> None:
        """Make these shards; Unfinished if one failed."""
        tasks = tasks_of(todo)
        rooms = {name: self.rooms.get(name, Room()) for name in tasks}

        def start(name: str, options: dict[str, Any]) -> Any:
            return _actor(options).remote(self.build, orders[name], _samples(todo[name]))

        cluster = RayCluster(connect(self.address), start, rooms, self.threads, self.start_limit)
        cluster.check()
        with _Progress(stages, todo, progress) as bars:
            failures = Schedule(tasks, rooms, cluster, self.attempts, bars.done).run()
        if failures:
            raise Unfinished(_unfinished(stages[0].pool.folder.name, tasks, failures, self.attempts))


def _todo(stages: Sequence[Stage]) -> dict[str, list[Shard]]:
    return {stage.name: stage.todo() for stage in stages}


def _names(todo: Mapping[str, Sequence[Shard]]) -> set[str]:
    return {f"{stage} {shard.name}" for stage, shards in todo.items() for shard in shards}


def tasks_of(todo: Mapping[str, Sequence[Shard]]) -> dict[str, list[Task]]:
    """Tasks by stage; a shard needs that of the stage before, or its row's text, where that is missing."""
    tasks: dict[str, list[Task]] = {}
    before: dict[object, Task] = {}
    for stage, shards in todo.items():
        tasks[stage] = [
            Task(stage, shard, shard.row, before.get((shard.row, shard.block)) or before.get(shard.row))
            for shard in shards
        ]
        before = {
            (task.row, task.shard.block) if len(task.shard.candidates) else task.row: task
            for task in tasks[stage]
        }
    return tasks


def _samples(shards: Sequence[Shard]) -> list[Shard]:
    """One shard of each size, for which a worker prepares itself."""
    return list({shard.images: shard for shard in shards}.values())


def _unfinished(
    pool: str, tasks: Mapping[str, Sequence[Task]], failures: Mapping[Task, str], attempts: int
) -> str:
    total = sum(map(len, tasks.values()))
    first = [task for task in failures if task.needs not in failures]
    for task in first:
        log.error("pool %s, %s failed: %s", pool, task.name, failures[task])
    lines = [f"pool {pool}: {total - len(failures)} of {total} files are made; {len(first)} failed"]
    lines += [f"{task.name}: {failures[task].splitlines()[-1]}" for task in first[:LISTED]]
    if more := len(first) - LISTED:
        lines += [f"and {more} more"] if more > 0 else []
    if waiting := len(failures) - len(first):
        lines += [f"{waiting} more wait for them"]
    lines += [
        f"a shard is tried {attempts} times (engine.attempts) unless its input is at fault; the log has the "
        "traces. The same command makes what is missing"
    ]
    return "\n  ".join(lines)


class StageActor:
    """A worker: holds the models of one stage, and makes the shards that it is given."""

    def __init__(self, build: Build, order: Order, samples: Sequence[Shard]):
        self._build, self._order, self._samples = build, order, samples
        self._held = ExitStack()
        self._stage: Stage | None = None

    def load(self) -> tuple[str, bool]:
        """Load the stage's models onto the device; returns (error, whether an input is at fault)."""
        # a worker is no member of the job that its machine's Ray was started in
        for name in ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)

        def load() -> None:
            self._stage = stage = self._build(self._order)
            stage.setup(self._samples)
            self._held.enter_context(stage.backbone.placed(*stage.parts))

        return _caught(load)

    def make(self, shard: Shard) -> tuple[str, bool]:
        """Make a shard unless it is there; returns (error, whether an input is at fault)."""
        stage = self._stage
        assert stage is not None  # `load` comes first

        def make() -> None:
            with stage.pool.lock(stage.name, shard.row, wait=True):
                if shard in stage.missing(shard.row):
                    stage.run(shard, lambda count: None)

        return _caught(make)


def _caught(work: Callable[[], None]) -> tuple[str, bool]:
    """Errors as text, since their classes may not exist, or not be picklable, elsewhere."""
    try:
        work()
    except InputError as error:
        return f"{error} (on {socket.gethostname()})", True
    except Exception as error:
        return f"{traceback.format_exc()}{type(error).__name__} on {socket.gethostname()}: {error}", False
    return "", False


def _actor(options: dict[str, Any]) -> Any:
    import ray  # pyright: ignore[reportMissingImports] - an extra

    # a new actor replaces one that died: tasks sent to one that restarts fail at once, healthy as they are
    return ray.remote(max_restarts=0, max_task_retries=0, **options)(StageActor)


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
    import ray  # pyright: ignore[reportMissingImports] - an extra

    if ray.is_initialized():
        return ray
    where: dict[str, Any] = {"address": address}
    if address == LOCAL:
        where |= {"include_dashboard": False, **options}
    for left in reversed(range(STARTS)):
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
            return ray
        except Exception as error:  # Ray raises classes of its own, gRPC's and the standard library's
            if address == LOCAL and left:
                log.warning("Ray did not start (%s); it is tried again", first_line(error))
                continue
            raise InputError(_refused(address, error)) from error
    raise AssertionError


def _refused(address: str, error: Exception) -> str:
    text = str(error)
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
        """Raise InputError if a worker of some stage takes more devices than the cluster has."""
        has = self.devices()
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
        """Number of devices, as it was a second ago at most."""
        if (now := time.monotonic()) - self._looked >= PULSE:
            self._looked = now
            self._devices = self._gpus() or self._ray.cluster_resources().get("CPU", 0.0) // self._threads
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


class _Progress:
    """One bar a stage, counted by shard, and the figures of the run's loggers."""

    def __init__(self, stages: Sequence[Stage], todo: Mapping[str, Sequence[Shard]], shown: bool):
        self._stages = {stage.name: stage for stage in stages if todo[stage.name]}
        watch = current_watch()
        self._bars, self._followed = {}, {}
        for place, stage in enumerate(self._stages.values()):
            total = sum(map(stage.amount, todo[stage.name]))
            self._followed[stage.name] = watch and watch.begin(stage.name, stage.pool.folder, total)
            self._bars[stage.name] = tqdm(
                total=total,
                desc=f"{stage.name} of {stage.pool.folder.name}",
                unit=stage.unit,
                position=place,
                disable=not shown,
                dynamic_ncols=True,
            )

    def __enter__(self) -> _Progress:
        return self

    def done(self, task: Task) -> None:
        """Count a shard that was made."""
        amount, bar = self._stages[task.stage].amount(task.shard), self._bars[task.stage]
        if (followed := self._followed[task.stage]) and (note := followed(amount)):
            bar.set_postfix_str(note, refresh=False)
        bar.update(amount)

    def __exit__(self, *error: object) -> None:
        for stage, bar in self._bars.items():
            if followed := self._followed[stage]:
                followed.end()
            bar.close()

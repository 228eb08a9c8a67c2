"""The engine that fills pools with workers on a Ray cluster; needs the extra `ray`.

This process is the driver: it decides which worker makes which shard (`Schedule`) and loads no model for it.
A worker is an actor that builds one stage, with no other parts of the pipeline than the stage needs. It makes
one shard at a time and writes its file itself; Ray moves names only. Actors end with their driver.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from capo.data.engines.base import lost
from capo.data.engines.local import run_stage
from capo.data.engines.progress import stage_progress
from capo.data.engines.ray_actor import Build, actor_class
from capo.data.engines.ray_cluster import LOCAL, RayCluster, connect
from capo.data.engines.schedule import Room, Schedule, Task
from capo.data.pool import Shard
from capo.data.stages import Order, Stage
from capo.errors import Unfinished

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
            InputError: if there is no such cluster, if it has too few devices for a worker, or if a shard is
                missing after it was written.
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
            if gone := sorted(made & _names(todo)):
                unseen = "the machines do not see one folder, its disk does not keep written files"
                raise lost(gone[0], remote[0].pool.folder, unseen)

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
            return actor_class(options).remote(self.build, orders[name], _samples(todo[name]))

        cluster = RayCluster(connect(self.address), start, rooms, self.threads, self.start_limit)
        cluster.check()
        at_work = {stage.name: stage for stage in stages if todo[stage.name]}
        with ExitStack() as bars:
            reports = {
                name: bars.enter_context(stage_progress(stage, todo[name], progress, place))
                for place, (name, stage) in enumerate(at_work.items())
            }

            def done(task: Task) -> None:
                reports[task.stage](at_work[task.stage].amount(task.shard))

            failures = Schedule(tasks, rooms, cluster, self.attempts, done).run()
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

"""The engine of one process, and of the processes of a launcher: each makes what no other has made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from capo.data.engines.base import lost
from capo.data.engines.progress import stage_progress
from capo.data.pool import Shard
from capo.data.stages import Report, Stage
from capo.runtime.launch import launch

WAIT = 0.5  # seconds between checks of shards that another process is working on


@dataclass(frozen=True)
class LocalEngine:
    """Runs the stages one after another in this process; any number of processes may share a pool."""

    def run(self, stages: Sequence[Stage], progress: bool = True) -> None:
        """Make what the stages lack; see `run_stage`."""
        for stage in stages:
            run_stage(stage, progress)


def run_stage(stage: Stage, progress: bool = True) -> None:
    """Run the shards of a stage one after another in this process, until none is missing.

    Shards locked by another process are skipped and checked again later, in case that process dies. Of the
    processes of a launcher, the first shows the progress of all. Raises InputError if a shard is missing
    after it was written.
    """
    todo = stage.todo()
    if not todo:
        return
    try:
        _run_missing(stage, todo, progress)
    finally:  # also where a reward fails: its scorer leaves the device
        stage.close()


def _run_missing(stage: Stage, todo: list[Shard], progress: bool) -> None:
    stage.setup(todo)
    made: set[Shard] = set()
    shown = progress and launch().first
    with stage.backbone.placed(*stage.parts), stage_progress(stage, todo, shown) as report:
        while todo:
            busy = [shard for shard in todo if not _attempt(stage, shard, made, report)]
            if busy:
                time.sleep(WAIT)
            todo = busy or stage.todo()
            if gone := made.intersection(todo):
                name = f"{stage.name} {min(shard.name for shard in gone)}"
                raise lost(name, stage.pool.folder, "the disk does not keep written files")


def _attempt(stage: Stage, shard: Shard, made: set[Shard], report: Report) -> bool:
    """Run `shard` if it is missing. Returns False if another process holds its lock: try again later."""
    was_missing = stage.make(shard, report)
    if was_missing:
        made.add(shard)
    elif was_missing is False:  # made by another process: the bar shows what all make together
        report(stage.amount(shard))
    return was_missing is not None

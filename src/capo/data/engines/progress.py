"""Progress of a stage, as every engine shows it: a bar, and the figures of the run's loggers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from capo.data.pool import Shard
from capo.data.stages import Report, Stage
from capo.data.watching import current_watch


@contextmanager
def stage_progress(
    stage: Stage, todo: Sequence[Shard], shown: bool, position: int | None = None
) -> Iterator[Report]:
    """Context manager that yields what counts the units of `todo` that are finished.

    `position` is the bar's line, where several are shown at once.
    """
    total, watch = sum(map(stage.amount, todo)), current_watch()
    followed = watch.begin(stage.name, stage.pool.folder, total) if watch else None
    with tqdm(
        total=total,
        desc=f"{stage.name} of {stage.pool.folder.name}",
        unit=stage.unit,
        position=position,
        disable=not shown,
        dynamic_ncols=True,
    ) as bar:

        def report(count: int) -> None:
            if followed and (note := followed(count)):
                bar.set_postfix_str(note, refresh=False)
            bar.update(count)

        yield report
    if followed:
        followed.end()

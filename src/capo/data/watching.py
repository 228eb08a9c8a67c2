"""What a run follows while its pools are filled: the share that is done, rates, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from capo.runtime.outlook import SETTLED, Outlook, Work

EVERY = 30.0  # least seconds between two rows of figures
ROWS = 200  # about so many rows while the time doubles, however long a pool takes
SECONDS = "time/pool/seconds"  # over which figures of pools are drawn: pools are filled before the first step
HOURS_LEFT = "time/hours_left"  # of the whole command, as far as rates are known
RATES = {"text": "prompts_per_second", "latents": "images_per_second", "scores": "scored_per_second"}
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Place:
    """A pool as figures name it, and its whole work in the outlook, by stage of the pool."""

    name: str
    work: Mapping[str, Work] = field(default_factory=dict)


class PoolWatch:
    """Follows the stages of a run's pools, on the run's first process.

    Args:
        outlook: what is left of the run; it learns what is done, and how fast.
        places: folder of a pool, or the folder that holds it -> what is known of it.
        sinks: functions that take each row of figures.
        before: seconds of rows that earlier processes of the run have written.
    """

    def __init__(
        self,
        outlook: Outlook,
        places: Mapping[Path, Place],
        sinks: Sequence[Callable[[Figures], object]] = (),
        before: float = 0.0,
    ):
        self.outlook, self.sinks = outlook, list(sinks)
        self._places = {folder.absolute(): place for folder, place in places.items()}
        self._began = time.monotonic() - before

    def seconds(self) -> float:
        """Seconds that the run has been followed."""
        return time.monotonic() - self._began

    def begin(self, stage: str, folder: Path, units: int) -> StageWatch:
        """Begin a stage of the pool in `folder`, of which `units` are not there yet."""
        folder = folder.absolute()
        place = self._places.get(folder) or self._places.get(folder.parent) or Place(folder.name)
        return StageWatch(self, place, stage, units)


class StageWatch:
    """Follows one stage of a pool; it is called with the number of units finished since the last call."""

    def __init__(self, watch: PoolWatch, place: Place, stage: str, units: int):
        self.watch, self.place, self.stage = watch, place, stage
        self.units, self.done = units, 0
        self.work = place.work.get(stage)
        self._began = self._row_at = watch.seconds()
        self._row_done = 0
        self._lock = Lock()  # threads report too

    def __call__(self, count: int) -> str:
        """Count finished units; return a note for the bar, which is empty while nothing can be said."""
        with self._lock:
            self.done += count
            now, outlook = self.watch.seconds(), self.watch.outlook
            if self.work:
                outlook.done(self.work.stage, self.work.kind, count)
            if now - self._began < SETTLED:
                return ""
            self._measured(now)
            if now - self._row_at >= max(EVERY, now / ROWS):
                self._row(now)
            return outlook.note()

    def end(self) -> None:
        """Write the last row of the stage, however short it was."""
        with self._lock:
            now = self.watch.seconds()
            self._measured(now)
            self._row(now)

    def _measured(self, now: float) -> None:
        if self.work and self.done:
            self.watch.outlook.measured(self.work.kind, (now - self._began) / self.done)

    def _row(self, now: float) -> None:
        if self.done == self._row_done:
            return
        whole = max(self.units, self.work.units or 0) if self.work else self.units
        name, spent = f"pool/{self.place.name}", max(now - self._row_at, 1e-9)
        figures = {
            f"{name}/{self.stage}": 1 - max(0, self.units - self.done) / whole,
            f"time/{name}/{RATES.get(self.stage, 'images_per_second')}": (self.done - self._row_done) / spent,
            SECONDS: now,
        }
        left = self.watch.outlook.total
        if left.hours or not left.without:
            figures[HOURS_LEFT] = left.hours
        self._row_at, self._row_done = now, self.done
        for sink in self.watch.sinks:
            sink(figures)


_watch: ContextVar[PoolWatch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: PoolWatch | None) -> Iterator[None]:
    """Let `watch` follow the pools that are filled in the block; None: nothing follows them."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def current_watch() -> PoolWatch | None:
    """What follows the pools that are filled here; a variable, since pools are filled deep within a run."""
    return _watch.get()

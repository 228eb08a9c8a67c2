"""Order of work on a cluster: which worker makes which shard next, what is tried again, and who ends.

Nothing here knows how a worker is started; a `Cluster` does. The rules:

- A task is ready when the task that it needs is done. Of the stages with ready tasks, the last comes first.
- One task at a time for each worker; what lies between two stages is on disk.
- As long as a stage has tasks left but no worker, a device is left for it, where there are so many that one
  more or less makes little difference; with few devices, a stage that is worked on has them all.
- The workers of a stage without tasks end, and so does an idle one whose device another stage waits for.
- A task that fails is tried again, up to a number of attempts, unless its input is at fault; what needs a
  task that failed is not tried, and everything else is done.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ROUND = 1e-9  # devices are added up in parts
KEPT = 1 / 16  # largest share of the devices that waits for stages without a worker


@dataclass(eq=False)
class Task:
    """A shard of a stage.

    Attributes:
        stage: name of the stage.
        shard: what the worker is given.
        row: no two tasks of a stage with one row are worked on at the same time.
        needs: the task that must be done first, or None.
    """

    stage: str
    shard: Any
    row: int
    needs: Task | None = None

    @property
    def name(self) -> str:
        """Stage and shard, as messages name them."""
        return f"{self.stage} {self.shard.name}"


@dataclass(frozen=True)
class Room:
    """Devices that one worker of a stage takes, which may be a part of one, and the most workers it has."""

    devices: float = 1.0
    workers: int | None = None


@dataclass(eq=False)
class Worker:
    """A worker as the schedule sees it; `handle` is the cluster's own."""

    stage: str
    handle: Any = None
    ready: bool = False
    task: Task | None = None


@dataclass(frozen=True)
class Event:
    """Something that a worker reports: it is ready (`task` None), or has done its task, or failed.

    Attributes:
        worker: the worker.
        task: its task; None while it starts.
        error: what went wrong; empty if nothing did.
        final: whether trying again cannot help, since an input is at fault.
        lost: whether the worker is gone.
    """

    worker: Worker
    task: Task | None = None
    error: str = ""
    final: bool = False
    lost: bool = False


class Cluster(Protocol):
    """What starts workers and brings tasks to them. No method waits but `wait`."""

    def devices(self) -> float:
        """Number of devices that there are now; machines may come and go."""
        ...

    def start(self, worker: Worker) -> None:
        """Begin to start a worker and set its handle; `wait` reports when it is ready."""
        ...

    def submit(self, worker: Worker, task: Task) -> None:
        """Give a ready worker its task."""
        ...

    def stop(self, worker: Worker) -> None:
        """End a worker and free its device."""
        ...

    def wait(self) -> Sequence[Event]:
        """Wait until something has happened; may return nothing after a while."""
        ...


@dataclass
class Schedule:
    """Makes `tasks` on a cluster.

    Args:
        tasks: stage -> its tasks, in the order of the stages; `needs` leads to an earlier stage.
        rooms: stage -> what a worker of it takes.
        cluster: starts and feeds the workers.
        attempts: how often a task is tried, and how many workers of a stage may fail in a row while they
            start.
        done: called with each task that is done.
    """

    tasks: Mapping[str, Sequence[Task]]
    rooms: Mapping[str, Room]
    cluster: Cluster
    attempts: int = 3
    done: Callable[[Task], object] = lambda task: None
    failures: dict[Task, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._workers: list[Worker] = []
        self._most = {stage: self.rooms[stage].workers for stage in self.tasks}
        self._closed: set[Task] = set()
        self._tries: Counter[Task] = Counter()
        self._false_starts: Counter[str] = Counter()
        self._open = {stage: len(tasks) for stage, tasks in self.tasks.items()}
        self._needed_by: dict[Task, list[Task]] = {}
        self._ready: dict[str, deque[Task]] = {stage: deque() for stage in self.tasks}
        self._rows: set[tuple[str, int]] = set()
        for stage, tasks in self.tasks.items():
            for task in tasks:
                if task.needs is None:
                    self._ready[stage].append(task)
                else:
                    self._needed_by.setdefault(task.needs, []).append(task)

    def run(self) -> dict[Task, str]:
        """Do all tasks; return those that failed, with the reason. The workers have ended when it returns."""
        try:
            while any(self._open.values()):
                self._release()
                self._assign()
                for event in self.cluster.wait():
                    self._handle(event)
        finally:
            for worker in list(self._workers):
                self._end(worker)
        return self.failures

    # --- assignment ---

    def _assign(self) -> None:
        """Give ready tasks to idle workers, the last stage first, and start workers where there is room."""
        for stage in reversed(list(self.tasks)):
            for worker in self._idle(stage):
                if (task := self._next(stage)) is None:
                    break
                worker.task = task
                self._rows.add((stage, task.row))
                self.cluster.submit(worker, task)
            starting = sum(not worker.ready for worker in self._of(stage))
            while len(self._ready[stage]) > starting and self._may_start(stage):
                self._workers.append(worker := Worker(stage))
                self.cluster.start(worker)
                starting += 1

    def _next(self, stage: str) -> Task | None:
        """Take the next ready task of a stage whose row nobody works on."""
        ready = self._ready[stage]
        for _ in range(len(ready)):
            task = ready.popleft()
            if (stage, task.row) not in self._rows:
                return task
            ready.append(task)
        return None

    def _may_start(self, stage: str) -> bool:
        most = self._most[stage]
        if most is not None and len(self._of(stage)) >= most:
            return False
        wanted = self.rooms[stage].devices
        while True:
            kept = self._kept_for_others(stage)
            if wanted + kept <= self._free() + ROUND:
                return True
            if not self._end_idle_of_others(stage):
                return False

    def _kept_for_others(self, stage: str) -> float:
        """Devices left for other stages that have tasks left but no worker; none if that were too many."""
        others = [name for name, left in self._open.items() if left and name != stage and not self._of(name)]
        kept = self._devices(others)
        return kept if self._is_little(kept) else 0.0

    def _is_little(self, devices: float) -> bool:
        return devices <= KEPT * self.cluster.devices()

    def _end_idle_of_others(self, stage: str) -> bool:
        """End a worker of another stage that has nothing to do; the last one only if its device matters."""
        for other in self.tasks:
            idle = self._idle(other)
            if other == stage or not idle or self._ready[other]:
                continue
            last = len(self._of(other)) == 1 and self._of(stage)
            if not last or not self._is_little(self.rooms[other].devices):
                self._end(idle[0])
                return True
        return False

    def _release(self) -> None:
        for worker in list(self._workers):
            if not self._open[worker.stage] and worker.task is None:
                self._end(worker)

    def _of(self, stage: str) -> list[Worker]:
        return [worker for worker in self._workers if worker.stage == stage]

    def _idle(self, stage: str) -> list[Worker]:
        return [worker for worker in self._of(stage) if worker.ready and worker.task is None]

    def _devices(self, stages: Sequence[str]) -> float:
        return sum(self.rooms[stage].devices for stage in stages)

    def _free(self) -> float:
        return self.cluster.devices() - self._devices([worker.stage for worker in self._workers])

    def _end(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self.cluster.stop(worker)

    # --- what workers report ---

    def _handle(self, event: Event) -> None:
        worker, task = event.worker, event.task
        if worker not in self._workers:
            return  # it was ended meanwhile
        if task is None:
            self._started(event)
            return
        worker.task = None
        self._rows.discard((task.stage, task.row))
        if event.lost:
            self._end(worker)
        if not event.error:
            self._close(task)
            self.done(task)
            for waiting in self._needed_by.get(task, ()):
                self._ready[waiting.stage].append(waiting)
            return
        self._tries[task] += 1
        if event.final or self._tries[task] >= self.attempts:
            self._fail(task, event.error)
        else:
            self._ready[task.stage].append(task)

    def _started(self, event: Event) -> None:
        """A worker is ready, or could not start.

        After so many in a row, no more of the stage are started; if it has no other, it fails as a whole.
        """
        stage = event.worker.stage
        if not event.error:
            event.worker.ready = True
            self._false_starts[stage] = 0
            return
        self._end(event.worker)
        self._false_starts[stage] += 1
        if not event.final and self._false_starts[stage] < self.attempts:
            return
        if others := len(self._of(stage)):
            self._most[stage] = others
            return
        for task in self.tasks[stage]:
            if task not in self._closed:
                self._fail(task, f"no worker can start: {event.error}")

    def _fail(self, task: Task, error: str) -> None:
        """Note that a task failed, and with it all that needs it."""
        self.failures[task] = error
        self._close(task)
        for waiting in self._needed_by.get(task, ()):
            self._fail(waiting, f"waits for {task.name}")

    def _close(self, task: Task) -> None:
        self._closed.add(task)
        self._open[task.stage] -= 1

"""The worker of a Ray cluster: an actor that builds one stage of a pool and makes one shard at a time."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from capo.data.pool import Shard
from capo.data.stages import Order, Stage
from capo.errors import InputError

Build = Callable[[Order], Stage]  # picklable; builds a stage where it runs


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
        return _caught(lambda: stage.make(shard, lambda count: None, wait=True))


def _caught(work: Callable[[], object]) -> tuple[str, bool]:
    """Errors as text, since their classes may not exist, or not be picklable, elsewhere."""
    try:
        work()
    except InputError as error:
        return f"{error} (on {socket.gethostname()})", True
    except Exception as error:
        return f"{traceback.format_exc()}{type(error).__name__} on {socket.gethostname()}: {error}", False
    return "", False


def actor_class(options: dict[str, Any]) -> Any:
    """Return `StageActor` as a class of Ray, with options of `ray.remote`."""
    import ray  # pyright: ignore[reportMissingImports] - an extra

    # a new actor replaces one that died: tasks sent to one that restarts fail at once, healthy as they are
    return ray.remote(max_restarts=0, max_task_retries=0, **options)(StageActor)

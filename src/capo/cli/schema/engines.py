"""Section of the engine: which processes fill the pools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from capo.cli.schema.kinds import Count, Positive, Seconds
from capo.runtime.schema import Picked, Said, Section, key

ADDRESS = re.compile(r"local|auto|[^\s/]+:(\d{1,5})")


def _reachable(value: str) -> str:
    found = ADDRESS.fullmatch(value)
    if not found or not 0 < int(found[1] or 1) < 2**16:
        raise ValueError("no address")
    return value


Address = Annotated[str, AfterValidator(_reachable), Said("local, auto or HOST:PORT")]


class LocalEngine(Section):
    """Keys of engine=local."""

    kind: Literal["local", "ray"] = key("which processes fill the pools")


class Room(Section):
    """What the workers of a stage take."""

    devices: Positive = key("GPUs of a worker, or a part of one; without GPUs, times `threads` cores")
    workers: Count | None = key("most workers of the stage; null: no limit")


class RayEngine(LocalEngine):
    """Keys of engine=ray."""

    address: Address = key("local: a cluster of this machine alone; auto: that of RAY_ADDRESS; or HOST:PORT")
    attempts: Count = key("how often a shard is tried, unless its input is at fault")
    start_limit: Seconds = key("seconds in which a worker must have loaded its models")
    text: Room = key("workers that encode prompts")
    latents: Room = key("workers that draw")
    scores: Room = key("workers that decode and score")


class EngineKeys(Picked):
    """Mark of the engine, whose keys depend on its kind."""

    of_choice = True
    said = "a choice of engine: engine=local or engine=ray"
    registered: Mapping[str, type[Section]] = {"local": LocalEngine, "ray": RayEngine}

    def pick(self, value: Mapping[str, Any]) -> type[Section]:
        return self.registered.get(str(value.get("kind")), LocalEngine)


Engine = Annotated[Any, EngineKeys()]

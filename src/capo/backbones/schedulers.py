"""Look up diffusers' scheduler classes and their options."""

import inspect
from typing import Any, cast

import diffusers
from diffusers import SchedulerMixin

from capo.backbones.models import Scheduler
from capo.errors import InputError


def scheduler_class(name: str) -> type[Scheduler]:
    """Return diffusers' scheduler class of that name; raise InputError for any other name."""
    found: Any = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise InputError(f"model scheduler '{name}' is not a scheduler class of diffusers; try DDIMScheduler")
    return cast(type[Scheduler], found)


def options_of(kind: type[Scheduler]) -> set[str]:
    """Return the names of a scheduler class's options; its config may hold keys of other classes too."""
    return set(inspect.signature(kind.__init__).parameters)

"""diffusers' schedulers by name."""

import inspect

import diffusers
from diffusers import SchedulerMixin

from capo.errors import InputError


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """Diffusers' scheduler class of that name; InputError for another name."""
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise InputError(f"model scheduler '{name}' is no scheduler class of diffusers; try DDIMScheduler")
    return found


def options_of(kind: type[SchedulerMixin]) -> set[str]:
    """What a scheduler class can be configured with; its configs keep foreign keys too."""
    return set(inspect.signature(kind.__init__).parameters)

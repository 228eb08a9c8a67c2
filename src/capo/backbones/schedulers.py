"""Look up diffusers' scheduler classes and their options."""

import inspect

import diffusers
from diffusers import SchedulerMixin

from capo.errors import InputError


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """Return diffusers' scheduler class of that name; raise InputError for any other name."""
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise InputError(f"model scheduler '{name}' is not a scheduler class of diffusers; try DDIMScheduler")
    return found


def options_of(kind: type[SchedulerMixin]) -> set[str]:
    """Return the names of a scheduler class's options; its config may hold keys of other classes too."""
    return set(inspect.signature(kind.__init__).parameters)

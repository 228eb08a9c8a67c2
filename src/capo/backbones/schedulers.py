"""Look up diffusers' scheduler classes and their options."""

import inspect
from typing import Any, cast

import diffusers
import torch
from diffusers import SchedulerMixin

from capo.backbones.models import Scheduler
from capo.errors import InputError


def scheduler_class(name: str) -> type[Scheduler]:
    """Return diffusers' scheduler class of that name; raise InputError for any other name."""
    found: Any = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise InputError(
            f"model.backbone.scheduler={name}: diffusers has no such class of schedulers; try DDIMScheduler"
        )
    return cast(type[Scheduler], found)


def options_of(kind: type[Scheduler]) -> set[str]:
    """Return the names of a scheduler class's options; its config may hold keys of other classes too."""
    return set(inspect.signature(kind.__init__).parameters)


def started(scheduler: Scheduler, steps: int, device: torch.device) -> Scheduler:
    """Set the timesteps of a new scheduler; InputError where it refuses that number, or lacks such times."""
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        raise InputError(f"sampling.steps {steps}: {name} refuses: {error}") from error
    known = getattr(scheduler, "alphas_cumprod", None)
    if known is not None and scheduler.timesteps.max() >= len(known):
        raise InputError(
            f"sampling.steps {steps}: {name} begins at time {scheduler.timesteps.max():g}, and has "
            f"{len(known)} times: give fewer steps, or correct steps_offset, trained_betas and "
            "num_train_timesteps in scheduler/scheduler_config.json"
        )
    return scheduler

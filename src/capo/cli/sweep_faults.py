"""Messages for several values of a key, of which a sweep is made: with what to give instead."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import RangeSweep
from hydra.errors import HydraException

MOST_JOBS = 100_000
SEVERAL = re.compile(r"Ambiguous value for argument '(.+)'$", re.M)
INTERVAL = "does not support sweep type"
NO_STEP = "range() arg 3 must not be zero"
NO_BATCH = re.compile(r"hydra\.sweeper\.max_batch_size=(0|-\d+)")
NO_WORKERS = "n_jobs == 0"


def sweep_fault(message: str, arguments: Sequence[str]) -> str | None:
    """Message for values that make no sweep, from Hydra's or a launcher's own; None for any other error."""
    if found := SEVERAL.search(message):
        given = found[1]
        key, _, values = given.partition("=")
        return (
            f"{given}: several values stand here; for a sweep over them give -m, for a list "
            f"{key}=[{values}], and for one number a point and no comma"
        )
    if INTERVAL in message:
        given = next((text for text in arguments if "interval(" in text), "interval(...)")
        return f"{given}: a sweep takes no interval; give its values, {given.partition('=')[0]}=A,B,C"
    if NO_STEP in message:
        given = next((text for text in arguments if "range(" in text), "range(...)")
        return f"{given}: a step of 0 never ends; give range(FIRST,END,STEP) with another one"
    if NO_WORKERS in message:
        return "hydra.launcher.n_jobs=0: no job could begin; give a number of jobs, or -1 for all cores"
    return None


def number_fault(overrides: Sequence[str]) -> str | None:
    """Message for a sweep of more jobs than can be listed, or of none at a time; None for any other."""
    if batch := next((text for text in overrides if NO_BATCH.fullmatch(text)), None):
        return f"{batch}: no job could begin; give a number of jobs from 1 on, or leave it out"
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        swept = [override for override in parsed if override.is_sweep_override()]
        counts = [_count(override.value()) for override in swept]
    except (HydraException, ValueError, RecursionError):
        return None
    if (jobs := math.prod(counts)) <= MOST_JOBS:
        return None
    given = " ".join(str(override.input_line) for override in swept)
    return f"{given}: a sweep of {jobs:,} jobs; give fewer values, {MOST_JOBS:,} jobs at most"


def _count(values: object) -> int:
    if isinstance(values, RangeSweep):
        first, end, step = values.start or 0, values.stop or 0, values.step
        return max(0, math.ceil((end - first) / step)) if step else 0
    return len(getattr(values, "list", None) or [None])  # a glob is read later

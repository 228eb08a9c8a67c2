"""What is left of a run: units of work by stage, the seconds of a unit, and the hours that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

HOUR = 3600  # seconds
OF_POOLS = TEXT, LATENTS, SCORES = "text", "latents", "scores"  # stages and kinds of work
TRAINING = "training"  # likewise
DECODING = "decoding"  # a part of scoring
VALIDATION, EVALUATION = "validation", "evaluation"  # stages whose work is of the kinds of pools
STAGES = (*OF_POOLS, TRAINING, VALIDATION, EVALUATION)  # in the order of a run
PROMPTS = "the number of prompts"  # which some plans do not know
SETTLED = 20.0  # seconds of work from which on its pace replaces what was estimated


@dataclass(frozen=True)
class Work:
    """Units of work of one kind that a stage of a run takes; None: their number is unknown."""

    stage: str
    kind: str
    units: float | None


@dataclass(frozen=True)
class Cost:
    """Seconds of a unit of work on all devices together, and what they leave out for want of a rate."""

    seconds: float = 0.0
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hours:
    """Hours of a stage; with `without`, those things come on top, and the hours are a lower bound."""

    hours: float = 0.0
    without: tuple[str, ...] = ()

    def __add__(self, other: Hours) -> Hours:
        return Hours(self.hours + other.hours, tuple(dict.fromkeys([*self.without, *other.without])))

    def __str__(self) -> str:
        if self.without:
            return f"at least {told_hours(self.hours)}" if self.hours else "unknown"
        return told_hours(self.hours)


def told_hours(hours: float) -> str:
    """Format hours with two significant digits where they are few: 0.0042, 0.13, 12.5, 1,250."""
    if hours >= 100:
        return f"{hours:,.0f}"
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.2g}"


def told_time(left: Hours) -> str:
    """Format a time that is left: `12 min`, `at least 3.4 h`."""
    told = f"{60 * left.hours:.0f} min" if left.hours < 1.5 else f"{told_hours(left.hours)} h"
    return f"at least {told}" if left.without else told


@dataclass
class Outlook:
    """Work that is left, by (stage, kind), and the cost of a unit by kind; both change while a run works.

    A kind without a cost is unknown: `cost` says under which name it is missing.
    """

    left: dict[tuple[str, str], float | None] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)

    @classmethod
    def of(cls, work: Iterable[Work], costs: Mapping[str, Cost]) -> Outlook:
        """Outlook of a run that has begun nothing; an unknown number of units makes its sum unknown."""
        left: dict[tuple[str, str], float | None] = {}
        for part in work:
            key, so_far = (part.stage, part.kind), left.get((part.stage, part.kind), 0.0)
            left[key] = None if so_far is None or part.units is None else so_far + part.units
        return cls(left, dict(costs))

    def cost(self, kind: str) -> Cost:
        """Cost of a unit of this kind."""
        return self.costs.get(kind, Cost(without=(kind,)))

    def done(self, stage: str, kind: str, units: float) -> None:
        """Take `units` from the work that is left; what a stage was not known to need counts nothing."""
        left = self.left.get((stage, kind))
        if left is not None:
            self.left[stage, kind] = max(0.0, left - units)

    def measured(self, kind: str, seconds: float) -> None:
        """Replace the cost of a kind by a measured one."""
        self.costs[kind] = Cost(seconds)

    def replace(self, stage: str, units: float, seconds: float) -> None:
        """Replace what is left of a stage by `units` of its own kind, each of `seconds`."""
        self.left = {key: left for key, left in self.left.items() if key[0] != stage}
        self.left[stage, stage] = units
        self.measured(stage, seconds)

    def only(self, stage: str) -> None:
        """Leave the work of this stage: all others are done."""
        self.left = {key: left for key, left in self.left.items() if key[0] == stage}

    def hours(self) -> dict[str, Hours]:
        """Hours that are left of each stage, in the order of the work; what has nothing left is absent."""
        found: dict[str, Hours] = {}
        for (stage, kind), units in self.left.items():
            if units == 0:
                continue
            cost = self.cost(kind)
            more = (
                Hours(0.0, (PROMPTS,)) if units is None else Hours(units * cost.seconds / HOUR, cost.without)
            )
            found[stage] = found.get(stage, Hours()) + more
        return found

    @property
    def total(self) -> Hours:
        """Hours that are left of all stages."""
        return sum(self.hours().values(), Hours())

    def note(self) -> str:
        """The time that is left of all stages, in words for a bar; empty where nothing is known of it."""
        left = self.total
        return f"{told_time(left)} left in all" if left.hours else ""

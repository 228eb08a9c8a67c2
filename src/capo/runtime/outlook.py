"""What is left of a run: units of work by stage, the seconds of a unit, and the hours that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

HOUR = 3600  # seconds
PROMPTS = "the number of prompts"  # which some plans do not know


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

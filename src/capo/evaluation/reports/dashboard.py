"""Specify the W&B workspace in which a sweep is read: views with panels, and a report, as JSON values.

A panel names only keys that runs of the sweep hold. `capo.cli.dashboard` writes the specification, and makes
the workspace of it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capo.evaluation.reports.sweep_page import ORACLE, TEST, VALIDATION, WIDE, named, number_of

SCHEMA = 1
STEP = "trainer/global_step"  # the axis of curves
PICTURES = "validation"  # key of the image grids
COORDINATES = ("objective", "beta", "bias", "pairs", "rewards")  # settings beside the win-rates
# key of the command line -> its flat name among a run's settings
FLAT = {"objective.beta": "beta", "noise.bias": "bias", "trainer.lr": "lr", "model.name": "model"}
CURVES = {
    "Validation": ("val/win_rate", "val/score/"),
    "Loss and margin": ("train/loss", "train/h", "train/beta_h", "train/dR", "train/accuracy"),
    "Drift from the base": ("train/drift_winner", "train/drift_loser"),
    "Drift by time": ("drift/winner/", "drift/loser/"),
    "Gradient": ("train/gradient_norm", "train/gradient_signal", "train/clipped", "train/saturated"),
}


@dataclass(frozen=True)
class TrackedRun:
    """What W&B holds of a job.

    Attributes:
        id: its id in W&B.
        config: its flat settings, and everything else under `run`.
        summary: its final figures.
        curves: keys of its curves.
        pictures: whether it logged image grids.
    """

    id: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    curves: frozenset[str]
    pictures: bool = False

    def setting(self, name: str) -> Any:
        """Value of a setting by its dotted name, as W&B finds it; None if the run has none."""
        node: Any = self.config
        for part in name.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return None if isinstance(node, Mapping) else node


@dataclass(frozen=True)
class Tracked:
    """The runs of a sweep, and where W&B has them: entity (None: the key's own), project and group."""

    sweep: str
    project: str
    group: str
    runs: Sequence[TrackedRun]
    entity: str | None = None
    keys: Sequence[str] = field(default_factory=tuple)  # that vary, as on the command line

    @property
    def summary(self) -> list[str]:
        """Names of the finite final figures that some run holds."""
        held = [
            {name: value for name, value in run.summary.items() if math.isfinite(number_of(value))}
            for run in self.runs
        ]
        return list(dict.fromkeys(name for figures in held for name in figures))

    @property
    def curves(self) -> list[str]:
        """Names of the curves that some run holds."""
        return sorted({name for run in self.runs for name in run.curves})

    def values(self, setting: str) -> list[Any]:
        """Values of a setting, those of runs that have it."""
        return [value for run in self.runs if (value := run.setting(setting)) is not None]

    @property
    def axes(self) -> list[str]:
        """Settings that vary, by their names in W&B; the seed comes last."""
        found = [FLAT.get(key, key) for key in self.keys]
        found = [name if self.values(name) else f"run.{name}" for name in found]
        found += [name for run in self.runs for name in run.config if name != "run"]
        found = [name for name in found if len({json.dumps(value) for value in self.values(name)}) > 1]
        return sorted(dict.fromkeys(found), key=lambda name: name == "seed")

    @property
    def axis(self) -> str | None:
        """Setting over which win-rates are drawn: the numeric one with the most values, else the first."""
        settings = [name for name in self.axes if name != "seed"] or self.axes
        numeric = [name for name in settings if _are_numbers(self.values(name))]
        return max(numeric, key=lambda name: len(set(self.values(name))), default=next(iter(settings), None))


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)


def specification(tracked: Tracked, table: str) -> dict[str, Any]:
    """Return the workspace's views and the report of a sweep as JSON values.

    Args:
        tracked: the sweep's runs.
        table: the sweep's table as Markdown, for the report.

    Returns:
        `sweep`, `entity`, `project`, `group` and `runs` (ids); `views`, each with a `name` and `sections` of
        `panels`; `report` with `title`, `table` and `panels`. A panel has a `kind` (`scatter`, `bars`,
        `lines`, `parallel`, `images`) and a `title`; figures and settings stand in it as
        `{"summary": NAME}` and `{"config": NAME}`, curves by name. What no run holds is left out.
    """
    results = {
        "Win-rate by reward": over_axis(tracked),
        "Reward against reward": frontiers(tracked),
        "All settings": coordinates(tracked),
        "Rewards against exact measures": against_oracle(tracked),
    }
    views = {
        "results": results,
        "training": {name: curves(tracked, names) for name, names in CURVES.items()},
        "images": {"Base above policy, by step": images(tracked)},
    }
    specified = [
        {
            "name": f"{tracked.sweep}: {name}",
            "sections": [{"name": title, "panels": panels} for title, panels in sections.items() if panels],
        }
        for name, sections in views.items()
    ]
    return {
        "schema": SCHEMA,
        "sweep": tracked.sweep,
        "entity": tracked.entity,
        "project": tracked.project,
        "group": tracked.group,
        "runs": [run.id for run in tracked.runs],
        "views": [view for view in specified if view["sections"]],
        "report": {
            "title": tracked.sweep,
            "table": table,
            "panels": [panel for panels in results.values() for panel in panels],
        },
    }


def over_axis(tracked: Tracked) -> list[dict[str, Any]]:
    """Win-rates over the swept axis: points where it is a number, else bars; none if nothing varies."""
    axis = tracked.axis
    rates = named([dict.fromkeys(tracked.summary)], TEST) | (
        {"validation": VALIDATION} if VALIDATION in tracked.summary else {}
    )
    if axis is None:
        return []
    values = tracked.values(axis)
    if not _are_numbers(values):
        return [
            {"kind": "bars", "title": f"{name} by {axis}", "figure": figure, "by": axis}
            for name, figure in rates.items()
        ]
    log = min(values) > 0 and max(values) >= WIDE * min(values)
    return [
        {
            "kind": "scatter",
            "title": f"{name} over {axis}",
            "x": {"config": axis},
            "y": {"summary": figure},
            "log_x": log,
        }
        for name, figure in rates.items()
    ]


def frontiers(tracked: Tracked) -> list[dict[str, Any]]:
    """Win-rates of each two rewards against each other: further up and to the right is better."""
    rates = named([dict.fromkeys(tracked.summary)], TEST)
    return [
        _against(f"{second} against {first}", rates[first], rates[second])
        for first, second in itertools.combinations(rates, 2)
    ]


def _against(title: str, x: str, y: str) -> dict[str, Any]:
    """Scatter plot of two figures of the summary."""
    return {"kind": "scatter", "title": title, "x": {"summary": x}, "y": {"summary": y}, "log_x": False}


def coordinates(tracked: Tracked) -> list[dict[str, Any]]:
    """Parallel coordinates over the settings that some run has, and the win-rates."""
    settings = [name for name in dict.fromkeys([*COORDINATES, *tracked.axes]) if tracked.values(name)]
    rates = [*named([dict.fromkeys(tracked.summary)], TEST).values()]
    rates += [VALIDATION] if VALIDATION in tracked.summary else []
    if not rates:
        return []
    columns = [{"config": name} for name in settings] + [{"summary": name} for name in rates]
    return [{"kind": "parallel", "title": "settings and win-rates", "columns": columns}]


def against_oracle(tracked: Tracked) -> list[dict[str, Any]]:
    """Each reward against the exact measure of its name, which detects reward hacking."""
    held = [dict.fromkeys(tracked.summary)]
    rates, measures = named(held, TEST), named(held, ORACLE)
    return [
        _against(f"{name} against its exact measure", measures[name], rates[name])
        for name in rates
        if name in measures
    ]


def curves(tracked: Tracked, names: Sequence[str]) -> list[dict[str, Any]]:
    """One panel for each curve that is named, or whose name begins with a name that ends in a slash."""
    found = [
        name
        for wanted in names
        for name in tracked.curves
        if name == wanted
        or (wanted.endswith("/") and name.startswith(wanted))
        or (wanted == VALIDATION and name.startswith(f"{VALIDATION}/"))
    ]
    return [{"kind": "lines", "title": name, "x": STEP, "y": [name]} for name in dict.fromkeys(found)]


def images(tracked: Tracked) -> list[dict[str, Any]]:
    """Image grids of the validations, steps against runs."""
    if not any(run.pictures for run in tracked.runs):
        return []
    return [{"kind": "images", "title": "validation images", "keys": [PICTURES]}]


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """Table of a sweep as Markdown; what would end a cell or begin markup is escaped."""
    lines = [
        [_cell(name) for name in columns],
        ["---"] * len(columns),
        *([_cell(row.get(name, "")) for name in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return "".join(f"\\{character}" if character in "\\|*_`[]<>" else character for character in text)

"""Arrange evaluated runs as frontiers: what is a method, what its strength is, and which runs are seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from capo.cli.run_labels import seed_groups
from capo.errors import DamagedFile, InputError
from capo.evaluation.frontiers import DRIFT_AT, Frontier, Point
from capo.evaluation.reports.frontiers import MethodComparison
from capo.evaluation.reports.sweep_page import curves, number_of, setting_of, strength_axis
from capo.evaluation.seeds import COLUMN, DRIFT, read_by_prompt
from capo.runtime.terminal import typed

SEED = "seed"  # label that is no setting
RUNS = "runs"  # label of runs that differ in what no other label shows
GROUP = "group"  # column of a row: place of its runs among the groups


def compare_methods(runs: Mapping[Path, Mapping[str, str]]) -> MethodComparison | None:
    """Arrange evaluated runs by method and strength; None if they are fewer than two settings or two rewards.

    Runs that differ in their seed alone are one point (`seed_groups`). The strength is the numeric label with
    the most values; without one, each setting is a method of one point.

    Args:
        runs: directory -> labels, such as {"objective.beta": "10", "pairs": "frs"}.
    """
    read, notes = _read(list(runs))
    groups = _groups(list(read))
    rewards = [name.removeprefix(COLUMN) for name in next(iter(read.values()), {}) if name.startswith(COLUMN)]
    if len(groups) < 2 or len(rewards) < 2:
        return None
    rows, keys = _rows(groups, runs)
    axis = strength_axis(rows, [key for key in keys if key != RUNS])
    lines = curves(rows, keys, axis) if axis else {setting_of(row, keys): [row] for row in rows}
    frontiers: dict[int, Frontier] = {}
    methods: dict[Path, str] = {}
    for name, line in lines.items():
        places = [int(str(row[GROUP])) for row in line]
        labels = [str(row[axis]) if axis else "" for row in line]
        points = [
            _point(label, [read[run] for run in groups[place]])
            for label, place in zip(labels, places, strict=True)
        ]
        ordered = len(line) == 1 or all(math.isfinite(number_of(label)) for label in labels)
        frontiers[min(places)] = Frontier(name, points, ordered)
        methods |= {run: name for place in places for run in groups[place]}
    return MethodComparison.of(
        axis, [frontiers[place] for place in sorted(frontiers)], rewards, methods, notes
    )


def _groups(folders: list[Path]) -> list[list[Path]]:
    """Group runs that differ in their seed alone; each other run is a group. In the order of the runs."""
    groups = list(seed_groups(folders).values())
    several = {folder for group in groups for folder in group}
    groups += [[folder] for folder in folders if folder not in several]
    return sorted(groups, key=lambda group: folders.index(group[0]))


def _rows(
    groups: list[list[Path]], runs: Mapping[Path, Mapping[str, str]]
) -> tuple[list[dict[str, str]], list[str]]:
    """Labels of each group, with its place under GROUP, and the labels that vary.

    Groups that these labels do not tell apart, as they differ in something else, get the label RUNS.
    """
    names = [
        name for name in dict.fromkeys(name for labels in runs.values() for name in labels) if name != SEED
    ]
    rows = [
        {name: runs[group[0]].get(name, "") for name in names} | {GROUP: str(place)}
        for place, group in enumerate(groups)
    ]
    keys = [name for name in names if len({row[name] for row in rows}) > 1]
    if len({tuple(row[key] for key in keys) for row in rows}) < len(rows):
        keys.append(RUNS)
        for row, group in zip(rows, groups, strict=True):
            row[RUNS] = ", ".join(folder.name for folder in group)
    return rows, keys


def _read(folders: list[Path]) -> tuple[dict[Path, dict[str, torch.Tensor]], list[str]]:
    """Read what runs of the same prompts and rewards measured by prompt; say which ones are left out."""
    found: dict[Path, dict[str, torch.Tensor]] = {}
    notes, first = [], None
    for folder in folders:
        try:
            prompts, measured = read_by_prompt(folder)
        except DamagedFile as error:
            notes.append(f"{folder.name} is left out: {error}")
            continue
        except InputError:
            notes.append(
                f"{folder.name} is left out: it has no win-rates by prompt; run evaluate.py "
                f"{typed('run', folder)}"
            )
            continue
        kind = prompts, [name for name in measured if name != DRIFT]
        first = first or kind
        if kind == first:
            found[folder] = measured
        else:
            notes.append(f"{folder.name} is left out: it was evaluated on other prompts or rewards")
    return found, notes


def _point(label: str, runs: list[dict[str, torch.Tensor]]) -> Point:
    """Stack what the seeds of a point measured."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return Point(
        label,
        {
            DRIFT_AT if name == DRIFT else name.removeprefix(COLUMN): torch.stack([run[name] for run in runs])
            for name in names
        },
    )

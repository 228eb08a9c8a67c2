"""Print what a run optimizes before its first step, and check its beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from capo.data.candidates import Candidates
from capo.evaluation.reports.rounds import round_table
from capo.module import PreferenceModule
from capo.training.rounds import Row


def print_summary(facts: Mapping[str, Any], module: PreferenceModule, console: Console) -> None:
    """Print a table of `facts` and the number of trained parameters."""
    trained = sum(p.numel() for p in module.policy.parameters() if p.requires_grad)
    rows = {
        **facts,
        "error": "mean over channels, height and width, float32; loss: mean over pairs",
        "trained parameters": f"{trained:,}",
    }
    _print_table("what is being optimized", rows, console)


def print_selection(candidates: Candidates, data: str, console: Console) -> None:
    """Print a table of the training `data`, its prompts and pairs, and the spread of each label source."""
    found = candidates.selection.statistics()
    rows = {
        "data": data,
        "prompts": f"{found.usable} kept, {found.prompts - found.usable} skipped (no pair with dR > 0)",
        "X+ / X-": f"{found.winners:.1f} / {found.losers:.1f} candidates per prompt, "
        f"{found.pairs:.1f} pairs to draw from",
    }
    for name, spread_ in zip(candidates.labels, candidates.spreads, strict=True):
        shares = (
            ""
            if spread_.flat != spread_.flat
            else f", flat {spread_.flat:.0%}, saturated {spread_.saturated:.0%} of prompts"
        )
        rows[f"spread of {name}"] = f"{spread_.std:.3f}{shares}"
    _print_table("pairs", rows, console)


def print_rounds(rows: Sequence[Row], console: Console) -> None:
    """Print a table of the rounds of training: steps, prompts, pairs, and the win-rates at their ends."""
    headings, cells = round_table(rows)
    table = Table(*headings, title="rounds", title_justify="left")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _print_table(title: str, rows: Mapping[str, Any], console: Console) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def unused_devices(seen: int, used: int) -> str | None:
    """Return a line that says how to use all GPUs of this machine, or None if there is none to spare."""
    if seen <= used:
        return None
    return (
        f"{seen} GPUs seen, {used} used: torchrun --nproc-per-node {seen} train.py trainer=ddp ... "
        "hydra.run.dir=DIR uses them all"
    )


def beta_warning(
    objective: str, beta: float | None, ranges: dict[str, Sequence[float]], model: str
) -> str | None:
    """Return a warning if `beta` lies outside the range measured for the objective and model, else None.

    `ranges`: objective -> (lowest, highest) beta that was measured.
    """
    if beta is None or ranges.get(objective) is None:
        return None
    low, high = ranges[objective]
    if low <= beta <= high:
        return None
    return (
        f"objective.beta={beta:g} lies outside {low:g}-{high:g}, the range that was measured for {objective} "
        f"on {model}"
    )

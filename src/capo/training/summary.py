"""Print what a run optimizes before its first step, and check its beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from capo.data.candidates import Candidates
from capo.module import PreferenceModule


def print_summary(
    facts: dict[str, Any], candidates: Candidates, module: PreferenceModule, console: Console
) -> None:
    """Print a table of `facts`, numbers of parameters and pairs, and the spread of each label source."""
    found = candidates.selection.statistics()
    table = Table(title="what is being optimized", show_header=False, title_justify="left")
    trained = sum(p.numel() for p in module.policy.parameters() if p.requires_grad)
    rows = facts | {
        "error": "mean over channels, height and width, float32; loss: mean over pairs",
        "trained parameters": f"{trained:,}",
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
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


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

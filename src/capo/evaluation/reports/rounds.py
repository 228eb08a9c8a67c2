"""Show the rounds of a run: steps, prompts, pairs, and the win-rates on validation prompts at their ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capo.runtime.reading import cell, read_rows
from capo.runtime.run_folder import MONITOR, ROUNDS

REMEDY = "restore it, or remove it: the report then shows no rounds"
WHOLE = ("round", "first step", "last step", "prompts", "prompts with a pair")  # columns of whole numbers


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Read `rounds.csv` of a run directory, figures as numbers; no rows where there is no such file.

    Raises DamagedFile if it cannot be read as what it should be.
    """
    path = folder / ROUNDS
    try:
        rows = read_rows(path, REMEDY)
    except FileNotFoundError:
        return []
    kinds = dict.fromkeys(WHOLE, int) | {"pairs per prompt": float}

    def numbers(row: Mapping[str, str]) -> dict[str, Any]:
        rates = {name: float for name in row if name.startswith(MONITOR)}
        read = {name: cell(path, row, name, kind, REMEDY) for name, kind in (kinds | rates).items()}
        return {**row, **read}

    return [numbers(row) for row in rows]


def round_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table of rounds, of rows as in `rounds.csv`."""
    rewards = [name for name in rows[0] if name.startswith(f"{MONITOR}/")] if rows else []
    headings = ["steps", "prompts with a pair", "pairs per prompt", "win-rate"]
    return [*headings, *(name.removeprefix(f"{MONITOR}/") for name in rewards)], [
        [
            f"{row['first step']}-{row['last step']}",
            f"{row['prompts with a pair']} of {row['prompts']}",
            f"{row['pairs per prompt']:.1f}",
            *(f"{row[name]:.3f}" for name in (MONITOR, *rewards)),
        ]
        for row in rows
    ]

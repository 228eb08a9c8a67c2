"""Runs that differ in their training seed: win-rates over seeds, with errors due to seeds and to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich import box
from rich.table import Column, Table
from torch import Tensor

from capo.errors import DamagedFile, InputError
from capo.evaluation.statistics import OverSeeds
from capo.runtime.reading import read_rows
from capo.runtime.run_folder import EVALUATION, RATES

COLUMN = "win_rate/"  # begins the name of a reward's column in win_rates.csv
DRIFT = "drift"  # column of the distance of the policy's latents from the base's at equal seeds


def read_rates(folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Read the win-rates of a run's evaluation by prompt: ids (P), and reward -> (P,).

    Raises InputError if the run has not been evaluated, or by an earlier version.
    """
    prompts, found = read_by_prompt(folder)
    return prompts, {
        name.removeprefix(COLUMN): values for name, values in found.items() if name.startswith(COLUMN)
    }


def read_by_prompt(folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Read the win-rates and, where an evaluation measured it, the drift: ids (P), and column -> (P,).

    Raises InputError as `read_rates` does.
    """
    path = folder / EVALUATION / RATES
    try:
        rows = read_rows(path, f"run evaluate.py run={folder}")
        found = {
            name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
            for name in rows[0]
            if name.startswith(COLUMN) or name == DRIFT
        }
        if not all(values.isfinite().all() for values in found.values()):
            raise ValueError("a number is not finite")
        return [row["prompt_id"] for row in rows], found
    except DamagedFile:
        raise
    except (FileNotFoundError, ValueError, LookupError) as error:
        raise InputError(
            f"runs: the win-rates by prompt of {folder} cannot be read ({path}: {error}); run evaluate.py "
            f"run={folder}"
        ) from error


def over_seeds(folders: Sequence[Path]) -> dict[str, OverSeeds]:
    """Win-rates of two or more runs on the same prompts over their seeds, by reward.

    Raises InputError if a run has not been evaluated, or was on one prompt, other prompts or rewards.
    """
    read = [read_rates(folder) for folder in folders]
    for folder, (prompts, rates) in zip(folders, read, strict=True):
        if prompts != read[0][0] or rates.keys() != read[0][1].keys():
            raise InputError(
                f"runs: {folder} and {folders[0]} were evaluated on different prompts or rewards; evaluate "
                "both with the same"
            )
    if len(read[0][0]) < 2:
        raise InputError(f"runs: {folders[0]} was evaluated on one prompt; over seeds, two are needed")
    return {name: OverSeeds.of(torch.stack([rates[name] for _, rates in read])) for name in read[0][1]}


def seeds_table(groups: Mapping[str, Sequence[Path]]) -> Table:
    """Table with a row for each group of runs: the mean win-rate in % over its seeds, with its interval.

    `groups`: name -> run directories, two or more. Raises InputError as `over_seeds` does.
    """
    found = {name: over_seeds(folders) for name, folders in groups.items()}
    rewards = list(dict.fromkeys(reward for rates in found.values() for reward in rates))
    table = Table(
        Column("runs", overflow="fold"),
        "seeds",
        *rewards,
        title="over training seeds: mean win-rate and interval of seeds and prompts together, %",
        box=box.SIMPLE_HEAD,
    )
    for name, rates in found.items():
        cells = [_cell(rates[reward]) if reward in rates else "-" for reward in rewards]
        table.add_row(name, str(len(groups[name])), *cells)
    return table


def _cell(rate: OverSeeds) -> str:
    low, high = max(0.0, rate.interval[0]), min(1.0, rate.interval[1])  # of a share
    return f"{100 * rate.mean:.1f} ({100 * low:.1f}–{100 * high:.1f})"

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
from capo.evaluation.stored import Results
from capo.runtime.reading import cell, read_rows
from capo.runtime.run_folder import EVALUATION, RATES, RESULTS
from capo.runtime.stored import read_record
from capo.runtime.terminal import typed

COLUMN = "win_rate/"  # begins the name of a reward's column in win_rates.csv
ROUNDED = 2e-6  # by which the mean of values of six digits may differ from a mean of six digits
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
    place, again = folder / EVALUATION, f"run evaluate.py {typed('run', folder)}"
    try:
        return rates_in(place, again)
    except FileNotFoundError as error:
        told = f"{folder} has no win-rates by prompt ({place / RATES} does not exist)"
        raise InputError(f"runs: {told}; {again}") from error


def rates_in(folder: Path, remedy: str) -> tuple[list[str], dict[str, Tensor]]:
    """Read the win-rates of the evaluation in `folder`, as `read_by_prompt` does of a run.

    Raises FileNotFoundError if there are none, and DamagedFile, with `remedy`, for values that an evaluation
    does not write, and for columns whose means are not those of results.json beside them.
    """
    path = folder / RATES
    rows = read_rows(path, remedy)
    if not rows:
        raise DamagedFile(path, "it has no rows", remedy)
    found = {
        name: torch.tensor([cell(path, row, name, float, remedy) for row in rows], dtype=torch.float64)
        for name in rows[0]
        if name.startswith(COLUMN) or name == DRIFT
    }
    for name, values in found.items():
        if name != DRIFT and not 0 <= values.min() <= values.max() <= 1:
            reason = f"{name} goes from {values.min():g} to {values.max():g}, and win-rates from 0 to 1"
            raise DamagedFile(path, reason, remedy)
    _check_means(path, found, remedy)
    return [cell(path, row, "prompt_id", str, remedy) for row in rows], found


def _check_means(path: Path, found: Mapping[str, Tensor], remedy: str) -> None:
    """Raise DamagedFile if a column's mean is not that of results.json, where the evaluation has one."""
    try:
        told = read_record(path.with_name(RESULTS), Results, remedy)
    except FileNotFoundError:
        return
    means = {f"{COLUMN}{name}": rate["mean"] for name, rate in told["win_rate"].items()}
    if (drift := told.get("drift")) and DRIFT in found:  # which earlier versions did not measure
        means[DRIFT] = drift["latents"]["mean"]
    for name in dict.fromkeys([*means, *(name for name in found if name != DRIFT)]):
        if name not in found or name not in means:
            holder, other = (RESULTS, RATES) if name in means else (RATES, RESULTS)
            raise DamagedFile(path, f"{name} is in {holder}, but not in {other}", remedy)
        if abs(found[name].mean().item() - means[name]) > ROUNDED:
            reason = f"the mean of {name} is {found[name].mean():.6f}, but {means[name]:.6f} in {RESULTS}"
            raise DamagedFile(path, reason, remedy)


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

"""Compare evaluated runs in one table, and two of them head to head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from capo.data.pool import Pool
from capo.errors import InputError
from capo.evaluation.reports.formats import needed, p_value, with_span
from capo.evaluation.statistics import bootstrap_interval, paired_tests, prompts_needed
from capo.evaluation.stored import read_results, read_settings
from capo.runtime.files import named_twice
from capo.runtime.run_folder import CONFIG, EVALUATION, POOLS, RESULTS
from capo.runtime.terminal import typed
from capo.win_rates import win_rate

# settings of the evaluation that two runs must share to be compared head to head
SAME = ("prompts", "seed", "images_per_prompt", "rewards")


def run_folders(runs: str | Sequence[str]) -> list[Path]:
    """List the run directories that `runs` names: a list of them, one of them, or a multirun directory.

    Of a multirun directory, the jobs that have been evaluated are listed. Raises InputError if there are
    none, and for a run that is named twice, which would count as two seeds.
    """
    folders = [Path(runs)] if isinstance(runs, str) else [Path(run) for run in runs]
    if len(folders) == 1 and not (folders[0] / CONFIG).is_file():
        jobs = [path.parent for path in folders[0].glob(f"*/{CONFIG}")]
        jobs.sort(key=lambda job: (len(job.name), job.name))  # 2 before 10
        folders = [job for job in jobs if (job / EVALUATION / RESULTS).is_file()]
        if jobs and not folders:
            raise InputError(
                f"runs={runs}: none of its {len(jobs)} jobs has been evaluated; run evaluate.py "
                f"{typed('run', jobs[0])}"
            )
    if not folders:
        raise InputError(
            f"runs={runs}: no run directory there (one holds config.yaml and {EVALUATION}/{RESULTS})"
        )
    if twice := named_twice(folders):
        folder, first = twice
        also = "" if first == folder else f" and as {first}"
        raise InputError(f"runs: {folder} is named twice{also}, and would count as two runs: name it once")
    return folders


def policy_scores(folder: Path, settings: Mapping) -> dict[str, Tensor]:
    """Read the scores of a run's own images: reward -> (P, K), prompts in the order of `settings`.

    `settings` is the run's settings.json. Raises InputError if the pool lacks some of its prompts.
    """
    pool = _policy_pool(folder, settings)
    places = {prompt.id: place for prompt, place in pool.prompts}
    if missing := [prompt for prompt in settings["prompts"] if prompt not in places]:
        raise InputError(
            f"{pool.folder} lacks {len(missing)} of the evaluation's prompts; remove {folder / EVALUATION} "
            f"and run evaluate.py {typed('run', folder)}"
        )
    keys, positions = list(settings["rewards"].values()), [places[prompt] for prompt in settings["prompts"]]
    try:
        scores = pool.scores(keys, settings["images_per_prompt"], positions)
    except InputError as error:  # whose remedy is that of a pool that generate.py fills
        told = str(error).partition(";")[0]
        raise InputError(
            f"{told}; remove {folder / EVALUATION} and run evaluate.py {typed('run', folder)}"
        ) from error
    return {name: scores[..., number] for number, name in enumerate(settings["rewards"])}


def _policy_pool(folder: Path, settings: Mapping) -> Pool:
    """Open the pool of the finished evaluation; pools of another policy or seed may lie beside it."""
    for path in sorted((folder / EVALUATION / POOLS).glob("*/manifest.json")):
        pool = Pool.open(path.parent)
        if (pool.manifest.generator, pool.manifest.seed) == (settings["policy_generator"], settings["seed"]):
            return pool
    raise InputError(
        f"{folder / EVALUATION / POOLS} no longer holds the images of {RESULTS}; remove "
        f"{folder / EVALUATION} and run evaluate.py {typed('run', folder)}"
    )


def head_to_head(first: Path, second: Path) -> dict[str, dict[str, Any]]:
    """Win-rate of the first run's images against the second's.

    Returns:
        Reward -> {"mean", "low", "high", "p", "holm", "prompts_needed"}: win-rate in 0-1, its 95 % interval
        over prompts, the p-values of a paired test (`paired_tests`), plain and by Holm over the rewards, and
        the number of prompts that would show a difference of that size (`prompts_needed`).

    Raises:
        InputError: the two were evaluated with different prompts, seeds, numbers of images or rewards.
    """
    settings = [read_settings(folder) for folder in (first, second)]
    if differing := [key for key in SAME if settings[0][key] != settings[1][key]]:
        raise InputError(
            f"{first} and {second} were evaluated with different {', '.join(differing)}; "
            "evaluate both with the same"
        )
    ours, theirs = policy_scores(first, settings[0]), policy_scores(second, settings[1])
    seed = settings[0]["seed"]
    rates = {name: win_rate(ours[name], theirs[name]).double() for name in ours}
    tests, found = paired_tests({name: rate - 0.5 for name, rate in rates.items()}, seed), {}
    for name, rate in rates.items():
        low, high = bootstrap_interval(rate, seed)
        found[name] = {
            "mean": rate.mean().item(),
            "low": low,
            "high": high,
            **tests[name],
            "prompts_needed": prompts_needed(rate - 0.5),
        }
    return found


def compare_runs(folders: Sequence[Path], console: Console) -> dict:
    """Print tables with one row per run and, for two runs, their head-to-head win-rates.

    Returns:
        {"results": {run: results.json}, "head_to_head": `head_to_head` or None}.

    Raises:
        InputError: a run has not been evaluated, or two runs were evaluated with different settings.
    """
    results = {str(folder): read_results(folder) for folder in folders}
    _print_rows(console, results, "win_rate", "win-rate against the base, %", with_span)
    _print_rows(console, results, "oracle", "oracle, base → policy", _moved)
    versus = head_to_head(*folders) if len(folders) == 2 else None
    if versus:
        title = f"{folders[0]} against {folders[1]}, %"
        table = Table("reward", "win-rate", "p (Holm)", "", title=title, box=box.SIMPLE_HEAD)
        for name, rate in versus.items():
            table.add_row(name, with_span(rate), p_value(rate["holm"]), needed(rate, 0.5))
        console.print(table)
    return {"results": results, "head_to_head": versus}


def _print_rows(
    console: Console, results: Mapping[str, Mapping], key: str, title: str, cell: Callable[[Mapping], str]
) -> None:
    """Print a table of `results[run][key]`, one row per run; nothing if no run has such results."""
    names = list(dict.fromkeys(name for found in results.values() for name in found.get(key, {})))
    if not names:
        return
    table = Table(Column("run", overflow="fold"), *names, title=title, box=box.SIMPLE_HEAD)
    for run, found in results.items():
        entries = found.get(key, {})
        table.add_row(run, *(cell(entries[name]) if name in entries else "-" for name in names))
    console.print(table)


def _moved(measure: Mapping[str, float]) -> str:
    return f"{measure['base']:.3f} → {measure['policy']:.3f}"

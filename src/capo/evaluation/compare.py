"""Several evaluated runs in one table, and two of them head to head."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from capo.data.pool import Pool
from capo.errors import InputError
from capo.evaluation.statistics import bootstrap_interval
from capo.metrics import win_rate
from capo.runtime.run_folder import EVALUATION, RESULTS

# settings that two runs must share to be set against each other
SAME = ("prompts", "seed", "images_per_prompt", "rewards")


def run_folders(runs: str | Sequence[str]) -> list[Path]:
    """The run directories that `runs` names: a list of them, or a multirun directory.

    Of a multirun the evaluated jobs count. Raises InputError where there is none.
    """
    folders = [Path(runs)] if isinstance(runs, str) else [Path(run) for run in runs]
    if len(folders) == 1 and not (folders[0] / "config.yaml").is_file():
        jobs = [path.parent for path in folders[0].glob("*/config.yaml")]
        jobs.sort(key=lambda job: (len(job.name), job.name))  # 2 before 10
        folders = [job for job in jobs if (job / EVALUATION / RESULTS).is_file()]
        if jobs and not folders:
            raise InputError(
                f"runs={runs}: none of its {len(jobs)} jobs has been evaluated; run evaluate.py run={jobs[0]}"
            )
    if not folders:
        raise InputError(
            f"runs={runs}: no run directory there (one holds config.yaml and {EVALUATION}/{RESULTS})"
        )
    return folders


def _read(folder: Path, name: str) -> dict:
    path = folder / EVALUATION / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"runs: {folder} has not been evaluated ({path} is not there); run evaluate.py run={folder}"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"runs: {path} cannot be read ({error}); remove it and run evaluate.py run={folder}"
        ) from error


def policy_scores(folder: Path, settings: Mapping) -> dict[str, Tensor]:
    """Reward -> (P, K) scores of a run's own images, prompts in the order of its settings."""
    pool = _policy_pool(folder, settings)
    places = {prompt.id: place for prompt, place in pool.prompts}
    if missing := [prompt for prompt in settings["prompts"] if prompt not in places]:
        raise InputError(
            f"{pool.folder} lacks {len(missing)} of the evaluation's prompts; remove {folder / EVALUATION} "
            f"and run evaluate.py run={folder}"
        )
    keys, positions = list(settings["rewards"].values()), [places[prompt] for prompt in settings["prompts"]]
    scores = pool.scores(keys, settings["images_per_prompt"], positions)
    return {name: scores[..., number] for number, name in enumerate(settings["rewards"])}


def _policy_pool(folder: Path, settings: Mapping) -> Pool:
    """The pool of the finished evaluation; one that another policy or seed has begun may lie beside it."""
    for path in sorted((folder / EVALUATION / "pool").glob("*/manifest.json")):
        pool = Pool.open(path.parent)
        if (pool.manifest.generator, pool.manifest.seed) == (settings["policy_generator"], settings["seed"]):
            return pool
    raise InputError(
        f"{folder / EVALUATION / 'pool'} no longer holds the images of {RESULTS}; remove "
        f"{folder / EVALUATION} and run evaluate.py run={folder}"
    )


def head_to_head(first: Path, second: Path) -> dict[str, dict[str, float]]:
    """Reward -> win-rate of the first run's images against the second's, with its interval over prompts.

    Raises InputError where the two were evaluated with other prompts, seeds, images or rewards.
    """
    settings = [_read(folder, "settings.json") for folder in (first, second)]
    if differing := [key for key in SAME if settings[0][key] != settings[1][key]]:
        raise InputError(
            f"{first} and {second} were evaluated with other {', '.join(differing)}; "
            "evaluate both with the same"
        )
    ours, theirs = policy_scores(first, settings[0]), policy_scores(second, settings[1])
    found = {}
    for name in ours:
        rates = win_rate(ours[name], theirs[name])
        low, high = bootstrap_interval(rates, settings[0]["seed"])
        found[name] = {"mean": rates.double().mean().item(), "low": low, "high": high}
    return found


def compare_runs(folders: Sequence[Path], console: Console) -> dict:
    """Print tables with a row a run, and for two runs their head-to-head win-rates; returns both as values.

    {"results": {run: results.json}, "head_to_head": {reward: {mean, low, high}} or None}. Raises InputError
    for a run that has not been evaluated, and for two that cannot be set against each other.
    """
    results = {str(folder): _read(folder, RESULTS) for folder in folders}
    _print_rows(console, results, "win_rate", "win-rate against the base, %", _span)
    _print_rows(console, results, "oracle", "oracle, base → policy", _moved)
    versus = head_to_head(*folders) if len(folders) == 2 else None
    if versus:
        title = f"{folders[0]} against {folders[1]}, %"
        table = Table("reward", "win-rate", title=title, box=box.SIMPLE_HEAD)
        for name, rate in versus.items():
            table.add_row(name, _span(rate))
        console.print(table)
    return {"results": results, "head_to_head": versus}


def _print_rows(
    console: Console, results: Mapping[str, Mapping], key: str, title: str, cell: Callable[[Mapping], str]
) -> None:
    """A table of what results hold under `key`, a column a reward or measure; none where no run has it."""
    names = list(dict.fromkeys(name for found in results.values() for name in found.get(key, {})))
    if not names:
        return
    table = Table(Column("run", overflow="fold"), *names, title=title, box=box.SIMPLE_HEAD)
    for run, found in results.items():
        entries = found.get(key, {})
        table.add_row(run, *(cell(entries[name]) if name in entries else "-" for name in names))
    console.print(table)


def _span(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['mean']:.1f} ({100 * rate['low']:.1f}–{100 * rate['high']:.1f})"


def _moved(measure: Mapping[str, float]) -> str:
    return f"{measure['base']:.3f} → {measure['policy']:.3f}"

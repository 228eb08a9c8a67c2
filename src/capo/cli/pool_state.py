"""`generate.py stage=status` and `stage=verify`: what is done of the pools, and which files are bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from capo.cli.build import Components, imported_pool
from capo.data.generation import stages_of, view_pool
from capo.data.pool import Pool, Shard
from capo.data.pool_state import StageState, faults_of, repair, states_of, told_age
from capo.data.stages import Stage
from capo.errors import InputError, Unfinished
from capo.runtime.files import write_json
from capo.runtime.outlook import HOUR, Hours, told_time
from capo.runtime.run_folder import STATUS
from capo.runtime.terminal import Terminal

ROUNDS = (
    "online.every: pools of rounds stand in the run directory, and are not looked at here; the same train.py "
    "command completes them, and makes damaged files again"
)
LISTED = 20  # files at fault that are named on the console; the log has all of them


def pools_of(
    cfg: DictConfig, components: Components
) -> Iterator[tuple[str, Pool | None, list[Stage], Shard | None]]:
    """Yield (name, pool, stages, absent) of each pool of the configuration; no pool where none was begun.

    The stages are those of the prompts that the pool has; `absent` stands for the others (`states_of`).
    Nothing is written.
    """
    generator = components.generator
    for name, spec in components.pool_specs.items():
        if name == "train" and cfg.pool.imported:
            continue
        pool = view_pool(spec, generator)
        if pool is None:
            yield name, None, [], None
            continue
        there = pool.present(spec.prompts)
        lacking = range(len(spec.prompts) - len(there))
        absent = Shard(0, 0, lacking, range(spec.candidates)) if lacking else None
        judges = components.judges[name]
        yield name, pool, stages_of(pool, spec, generator, judges, verify=False, prompts=there), absent


def check_pools(cfg: DictConfig, components: Components) -> None:
    """Raise InputError for a pool that is there and cannot be used, before an image is drawn into another."""
    for name, spec in components.pool_specs.items():
        if name == "train" and cfg.pool.imported:
            imported_pool(cfg, components.splits).check(components.backbone, components.generator.settings)
        else:
            view_pool(spec, components.generator)


def show_status(cfg: DictConfig, components: Components, console: Terminal) -> None:
    """Print what is done of each pool by stage, with rate, time left and size, and write it as JSON.

    Text is counted in prompts, latents and scores in images.
    """
    table = Table("pool", "stage", "done", "", "per s", "left", "MiB", "newest", pad_edge=False)
    written = {}
    for name, pool, stages, absent in pools_of(cfg, components):
        if pool is None:
            table.add_row(name, "", "not begun")
            written[name] = None
            continue
        states = states_of(pool, stages, absent)
        written[name] = {"folder": str(pool.folder), "stages": [asdict(state) for state in states]}
        for number, state in enumerate(states):
            table.add_row("" if number else name, *_cells(state))
    console.print(table)
    if cfg.online.every is not None:
        console.print(ROUNDS, soft_wrap=True)
    if not any(written.values()):
        console.print(_none_there(cfg), soft_wrap=True)
    path = Path(cfg.run_dir) / STATUS
    write_json(path, written)
    console.print(f"as JSON: {path}", soft_wrap=True)


def _none_there(cfg: DictConfig) -> str:
    return (
        f"pool.root={cfg.pool.root}: none of the pools of this configuration is there; give the root and the "
        "values with which they were begun"
    )


def _cells(state: StageState) -> list[str]:
    left = state.seconds_left
    return [
        state.stage,
        f"{state.done}/{state.total}",
        f"{state.done / state.total:.0%}" if state.total else "",
        f"{state.rate:.3g}" if state.rate else "",
        "" if left is None else "none" if not left else told_time(Hours(left / HOUR)),
        f"{state.size / 2**20:,.1f}",
        "" if state.newest is None else told_age(state.newest),
    ]


def verify(cfg: DictConfig, components: Components, console: Terminal) -> None:
    """Read every file of the pools, name those that cannot be used, and make them again if `repair` is set.

    Raises Unfinished if a file is at fault and is not made again, and InputError if there is no pool.
    """
    found, there, others = 0, bool(cfg.pool.imported), []
    if cfg.pool.imported:
        place = f"pool.imported={cfg.pool.imported}"
        console.print(
            f"train: not read, since {place}; the stage=import that made it reads it", soft_wrap=True
        )
    for name, pool, stages, _ in pools_of(cfg, components):
        if pool is None:
            console.print(f"{name}: not begun")
            continue
        there = True
        faults = faults_of(pool, stages)
        files = sum(state.files for state in states_of(pool, stages))
        console.print(f"{name}: {files} files read, {len(faults)} at fault, in {pool.folder}", soft_wrap=True)
        for fault in faults[:LISTED]:
            console.print(f"  {fault.file}: {fault.reason}", markup=False, soft_wrap=True)
        if len(faults) > LISTED:
            console.print(f"  and {len(faults) - LISTED} more, which the log names")
        if faults and cfg.repair:
            repair(pool, stages, faults, components.generator.engine)
            console.print("  made again")
        else:
            found += len(faults)
            others += [fault.file for fault in faults if fault.file.exists() and not fault.file.is_file()]
    if cfg.online.every is not None:
        console.print(ROUNDS, soft_wrap=True)
    if not there:
        raise InputError(_none_there(cfg))
    if found:
        first = f"move away {others[0]}, which is no ordinary file; then " if others else ""
        raise Unfinished(
            f"{found} files cannot be used: {first}add repair=true to make them again, or run stage=all, "
            "which also makes what is missing"
        )

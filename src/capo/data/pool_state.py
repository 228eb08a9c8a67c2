"""State of a pool that may be unfinished: what is done of each stage, how fast, and which files are bad."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from capo.data.engines import Engine
from capo.data.pool import Pool, Shard
from capo.data.pool.layout import latents_path, row_of
from capo.data.stages import Stage

WINDOW = 600.0  # seconds before the newest file over which a rate is taken
READERS = 16  # threads that read headers: on a shared disk each read waits for the network


@dataclass(frozen=True)
class StageState:
    """State of one stage of a pool.

    Attributes:
        stage: name of the stage.
        unit: what it counts, prompt or image.
        done: units that are there and valid.
        total: units in all.
        files: number of files of the stage, whoever needs them.
        size: their size in bytes.
        rate: units a second over the last ten minutes of work; None if there are too few files to tell.
        newest: when the newest file was written, in seconds since the epoch; None without files.
    """

    stage: str
    unit: str
    done: int
    total: int
    files: int
    size: int
    rate: float | None
    newest: float | None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at this rate; None without one."""
        left = self.total - self.done
        return 0.0 if not left else left / self.rate if self.rate else None


def states_of(pool: Pool, stages: Sequence[Stage], absent: Shard | None = None) -> list[StageState]:
    """State of each stage of the pool; nothing is loaded, and no checksum is compared.

    `absent` has as many positions as the pool lacks prompts, and the candidates of each: more to do.
    """
    found = []
    for stage in stages:
        more = stage.amount(absent) if absent else 0
        total = more + sum(stage.amount(shard) for row in stage.rows for shard in stage.shards(row))
        left = more + sum(map(stage.amount, _todo(stage)))
        times, sizes = _files(pool.folder / stage.name)
        each = (total - left) / len(times) if times else 0.0
        newest = max(times, default=None)
        done, size, rate = total - left, sum(sizes), _rate(times, each)
        found.append(StageState(stage.name, stage.unit, done, total, len(times), size, rate, newest))
    return found


def _todo(stage: Stage) -> list[Shard]:
    with ThreadPoolExecutor(READERS) as readers:
        return [shard for missing in readers.map(stage.missing, stage.rows) for shard in missing]


def _files(folder: Path) -> tuple[list[float], list[int]]:
    """Times and sizes of the finished files below a folder."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return [stat.st_mtime for stat in stats], [stat.st_size for stat in stats]


def _rate(times: Sequence[float], units: float) -> float | None:
    """Units a second, with so many in a file, over the files written in the WINDOW before the newest one."""
    recent = [moment for moment in times if moment >= max(times) - WINDOW]
    span = max(recent) - min(recent) if recent else 0.0
    return units * (len(recent) - 1) / span if span > 0 else None


def told_age(moment: float) -> str:
    """How long ago a file was written, in words."""
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


@dataclass(frozen=True)
class Fault:
    """A file of a pool that cannot be used, and why."""

    stage: str
    row: int
    file: Path
    reason: str


def faults_of(pool: Pool, stages: Sequence[Stage], progress: bool = True) -> list[Fault]:
    """Read every file of the pool that the stages need, and return those that cannot be used.

    Header, checksum, fingerprint, prompts, candidates and shape are compared, and latents must be finite; a
    missing file is no fault.
    """
    return list(_faults(pool, stages, progress))


def _faults(pool: Pool, stages: Sequence[Stage], progress: bool) -> Iterator[Fault]:
    known: set[Path] = set()
    for stage in stages:
        with ThreadPoolExecutor(READERS) as readers:
            checked = readers.map(replace(stage, verify=True).missing, stage.rows)
            shown = tqdm(
                zip(stage.rows, checked, strict=True),
                total=len(stage.rows),
                desc=f"{stage.name} of {pool.folder.name}",
                unit="row",
                disable=not progress,
                dynamic_ncols=True,
            )
            for row, missing in shown:
                for path, reason in pool.faults.items():
                    if path not in known:
                        known.add(path)
                        # rows are read side by side: this one is that of the file's name
                        yield Fault(stage.name, row_of(path), path, reason)
                if stage.name == "latents":
                    yield from _not_finite(pool, stage, row, missing)


def _not_finite(pool: Pool, stage: Stage, row: int, missing: Sequence[Shard]) -> Iterator[Fault]:
    for shard in stage.shards(row):
        if shard not in missing and not bool(torch.isfinite(pool.read_latents(shard)).all()):
            file = latents_path(pool.folder, shard.row, shard.block)
            yield Fault(stage.name, row, file, "its latents are not finite")


def repair(pool: Pool, stages: Sequence[Stage], faults: Sequence[Fault], engine: Engine) -> None:
    """Remove the files at fault and make them again, with what else their rows lack.

    Raises InputError, and removes nothing, if one is no ordinary file, and what `Engine.run` raises.
    """
    pool.check_replaceable()
    for fault in faults:
        with pool.lock(fault.stage, fault.row, wait=True):
            fault.file.unlink(missing_ok=True)
    rows = sorted({fault.row for fault in faults})
    engine.run([replace(stage, rows=rows) for stage in stages])

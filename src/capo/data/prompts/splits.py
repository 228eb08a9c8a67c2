"""Prompt sets from files: filtered, without duplicates, disjoint by construction, drawn by a seed, and counted."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from rich.console import Console

from capo.data.prompts.identity import Prompt
from capo.data.prompts.report import SplitReport, left_out, report_table, shortages
from capo.data.prompts.rows import DUPLICATE, ELSEWHERE, EMPTY, FINE, KEPT, NSFW, OVER_LIMIT, fetch, scan
from capo.data.prompts.sources import PromptFile, Source, source_of
from capo.errors import InputError
from capo.runtime.launch import launch

SPLITS = ("train", "validation", "test")
PRIORITY = ("test", "validation", "train")

_remembered: dict[
    str, "PromptSets"
] = {}  # one entry: a stage asks twice, a sweep once a job, and the console hears it once


class PromptSets(dict[str, list[Prompt]]):
    """Prompts by split (train, validation, test); `report` says what was left out of each."""

    def __init__(self, splits: Mapping[str, list[Prompt]], report: Sequence[SplitReport]):
        super().__init__(splits)
        self.report = tuple(report)


def split_sets(
    train: Mapping,
    validation: Mapping,
    test: Mapping,
    seed: int | None = 0,
    priority: Sequence[str] = PRIORITY,
) -> PromptSets:
    """Three disjoint prompt sets; prints once, in one process, how many rows were left out and why.

    Args:
        train, validation, test: what `Source` takes, or the path of a file.
        seed: of the limits' draw and of the order, which is that of a hash of seed and prompt: files may be in any order, the first
            prompts of a set are a fair sample of it, and a larger limit only adds. None: the order of the files, and a limit takes
            the first.
        priority: a prompt that several splits hold stays in the one that is named first here.

    Raises InputError for sources that cannot be used, and for a split of which nothing is left.
    """
    if sorted(priority) != sorted(SPLITS):
        raise InputError(f"prompts.priority={list(priority)}: must name {', '.join(SPLITS)} once each")
    sources = {
        split: source_of(split, given) for split, given in zip(SPLITS, (train, validation, test), strict=True)
    }
    files = {split: source.files() for split, source in sources.items()}
    key = _state(sources, files, seed, priority)
    if key not in _remembered:
        found = read_sets(sources, files, seed, priority)
        _remembered.clear()
        _remembered[key] = found
        _show(found.report, {split: source.limit for split, source in sources.items()})
    return _remembered[key]


def read_sets(
    sources: Mapping[str, Source],
    files: Mapping[str, Sequence[PromptFile]],
    seed: int | None,
    priority: Sequence[str],
) -> PromptSets:
    """What `split_sets` gives, read anew and without a word."""
    taken = np.zeros(0, np.uint64)
    splits: dict[str, list[Prompt]] = {}
    reports: dict[str, SplitReport] = {}
    for split in priority:
        source = sources[split]
        ids, fates = scan(source, files[split])
        rows, fates = choose(ids, fates, taken, seed, source.limit)
        reports[split] = _report(source, files[split], fates)
        if not len(rows):
            raise InputError(_nothing_left(reports[split], priority))
        splits[split] = fetch(source, files[split], rows)
        taken = np.concatenate([taken, ids[rows]])
    return PromptSets({split: splits[split] for split in SPLITS}, [reports[split] for split in SPLITS])


def choose(
    ids: np.ndarray, fates: np.ndarray, taken: np.ndarray, seed: int | None, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows become prompts.

    Args:
        ids: (R,) uint64, the prompt of each row; 0 where it is empty.
        fates: (R,) uint8, FINE for rows that passed their own filters, else which of them they did not pass.
        taken: (T,) uint64, prompts of other splits.

    Returns:
        (K,) rows in the order of the set, and (R,) the fate of every row. A prompt of which any row is NSFW is left out whole,
        since a picture that was blurred once says something of the prompt.
    """
    fates = fates.copy()
    flagged = np.unique(ids[fates == NSFW])
    fates[np.isin(ids, flagged) & (fates != EMPTY)] = NSFW
    fine = np.flatnonzero(fates == FINE)
    first = fine[np.sort(np.unique(ids[fine], return_index=True)[1])]
    fates[fine] = DUPLICATE
    fates[first] = ELSEWHERE
    free = first[~np.isin(ids[first], taken)]
    fates[free] = OVER_LIMIT
    if seed is not None:
        free = free[np.argsort(_ranks(ids[free], seed), kind="stable")]
    kept = free[:limit]
    fates[kept] = KEPT
    return kept, fates


def _ranks(ids: np.ndarray, seed: int) -> np.ndarray:
    """(R,) uint64: the hash of seed and prompt by which a set is ordered and drawn."""
    hashed = (
        hashlib.blake2b(f"{seed}/{number:016x}".encode(), digest_size=8).digest() for number in ids.tolist()
    )
    return np.fromiter(map(int.from_bytes, hashed), np.uint64, len(ids))


def _report(source: Source, files: Sequence[PromptFile], fates: np.ndarray) -> SplitReport:
    counts = np.bincount(fates, minlength=KEPT + 1).tolist()
    places = tuple(_origin(source, file) for file in files)
    return SplitReport(source.split, source.title, places, len(fates), *counts[EMPTY:])


def _origin(source: Source, file: PromptFile) -> str:
    """Where a file came from: its path, or what it is called on the hub, with the commit."""
    parts = file.path.parts
    if source.path is not None or "snapshots" not in parts:
        return str(file.path)
    commit, *name = parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1 :]
    return f"{source.hub}/{'/'.join(name)}, revision {commit}"


def _nothing_left(report: SplitReport, priority: Sequence[str]) -> str:
    found = f"{report.read:,} rows read, {left_out(report)}"
    message = f"prompts.{report.split}: nothing is left of {report.name} ({report.places[0]}): {found}"
    first = priority[: priority.index(report.split)]
    if report.elsewhere and first:
        return f"{message}; leave some: a limit for {' or '.join(first)} (prompts.{first[0]}.limit=N), or another prompts.priority"
    return f"{message}; give another file, or loosen prompts.{report.split}'s nsfw, where or max_length"


def _state(
    sources: Mapping[str, Source],
    files: Mapping[str, Sequence[PromptFile]],
    seed: int | None,
    priority: Sequence[str],
) -> str:
    """What the sets follow from, as text: equal where reading again would give the same."""
    seen = [
        sorted(file.path.glob("*.txt")) if file.form == "folder" else [file.path]
        for found in files.values()
        for file in found
    ]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for paths in seen for path in paths]
    return json.dumps(
        [{split: asdict(source) for split, source in sources.items()}, stats, seed, list(priority)],
        default=str,
    )


def _show(reports: Sequence[SplitReport], limits: dict[str, int | None]) -> None:
    if not launch().first:
        return
    console = Console()
    console.print(report_table(reports))
    for report in reports:
        more = f" and {len(report.places) - 1} more files" if len(report.places) > 1 else ""
        console.print(f"{report.split}: {report.places[0]}{more}", soft_wrap=True, highlight=False)
    for line in shortages(reports, limits):
        console.print(line, style="yellow", soft_wrap=True)

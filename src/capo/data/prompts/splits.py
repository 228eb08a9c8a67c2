"""Prompt sets from files: filtered, deduplicated, disjoint, sampled by a seed, and counted."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from capo.data.prompts.identity import SPLITS, Prompt
from capo.data.prompts.report import SplitReport, left_out, report_table, shortages
from capo.data.prompts.rows import DUPLICATE, ELSEWHERE, EMPTY, FINE, KEPT, NSFW, OVER_LIMIT, fetch, scan
from capo.data.prompts.sources import PromptFile, Source, source_of
from capo.errors import InputError
from capo.runtime.launch import launch
from capo.runtime.terminal import Terminal

PRIORITY = ("test", "validation", "train")

_remembered: dict[
    str, "PromptSets"
] = {}  # cache of one entry: stages and the jobs of a sweep ask again, but files and console output come once


class PromptSets(dict[str, list[Prompt]]):
    """Prompts by split (train, validation, test); `report` counts the rows left out of each."""

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
    """Read three disjoint prompt sets; the first process prints, once, how many rows were left out and why.

    Args:
        train: arguments of `Source`, or the path of a file.
        validation: likewise.
        test: likewise.
        seed: seed of the order, which is that of a hash of seed and prompt, and so of the sample that a limit
            takes. The order does not depend on that of the files, the first prompts of a set are a fair
            sample of it, and a larger limit only adds prompts. None: the order of the files, of which a limit
            takes the first prompts.
        priority: the splits in order; a prompt in several splits is kept in the first of these only.

    Returns:
        The prompt sets with their report.

    Raises:
        InputError: if a source is invalid or cannot be read, or no prompt of a split is left.
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
    """Read the prompt sets of `split_sets`, without cache and without output."""
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


def expected_sizes(settings: Mapping) -> dict[str, int | None]:
    """Number of prompts that `read_sets` will keep of each split, as far as known without reading a file.

    `settings` are the arguments of `split_sets`. The number is the limit, or what splits of higher priority
    leave of the published set, whichever is smaller; None if neither is known. An integer in place of a
    split's source is its size.
    """
    sizes: dict[str, int | None] = dict.fromkeys(SPLITS)
    taken: dict[str, int] = {}
    for split in settings.get("priority") or PRIORITY:
        given = settings.get(split)
        if not isinstance(given, Mapping):
            sizes[split] = given if isinstance(given, int) else None
            continue
        place = str([given.get(key) for key in ("path", "hub", "file", "revision")])
        size = given.get("published_size")
        known = [given.get("limit"), None if size is None else max(0, size - taken.get(place, 0))]
        sizes[split] = min((count for count in known if isinstance(count, int)), default=None)
        taken[place] = taken.get(place, 0) + (sizes[split] or 0)
    return sizes


def choose(
    ids: np.ndarray, fates: np.ndarray, taken: np.ndarray, seed: int | None, limit: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows that become prompts of a split.

    A prompt is left out if any of its rows is NSFW, since one blurred picture says something about the
    prompt.

    Args:
        ids: (R,) uint64 id of each row's prompt; 0 if it is empty.
        fates: (R,) uint8 outcomes of `scan`: FINE, or the filter that rejected the row.
        taken: (T,) uint64 ids of prompts in other splits.
        seed: seed of the order; None: the order of the rows.
        limit: largest number of prompts; None: no limit.

    Returns:
        (K,) numbers of the chosen rows, in the order of the set, and (R,) the outcome of every row.
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
    """Hash (R,) uint64 of seed and prompt id, the sort key of a set."""
    hashed = (
        hashlib.blake2b(f"{seed}/{number:016x}".encode(), digest_size=8).digest() for number in ids.tolist()
    )
    return np.fromiter(map(int.from_bytes, hashed), np.uint64, len(ids))


def _report(source: Source, files: Sequence[PromptFile], fates: np.ndarray) -> SplitReport:
    counts = np.bincount(fates, minlength=KEPT + 1).tolist()
    places = tuple(_origin(source, file) for file in files)
    return SplitReport(source.split, source.title, places, len(fates), *counts[EMPTY:])


def _origin(source: Source, file: PromptFile) -> str:
    """Origin of a file: its path, or its name on the hub with the commit."""
    parts = file.path.parts
    if source.path is not None or "snapshots" not in parts:
        return str(file.path)
    commit, *name = parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1 :]
    return f"{source.hub}/{'/'.join(name)}, revision {commit}"


def _nothing_left(report: SplitReport, priority: Sequence[str]) -> str:
    found = f"{report.read:,} rows read, {left_out(report)}"
    message = f"prompts.{report.split}: no prompt is left of {report.name} ({report.places[0]}): {found}"
    first = priority[: priority.index(report.split)]
    if report.elsewhere and first:
        return (
            f"{message}; leave some to it: set a limit for {' or '.join(first)} "
            f"(prompts.{first[0]}.limit=N), or another prompts.priority"
        )
    return f"{message}; give another file, or relax nsfw, where or max_length of prompts.{report.split}"


def _state(
    sources: Mapping[str, Source],
    files: Mapping[str, Sequence[PromptFile]],
    seed: int | None,
    priority: Sequence[str],
) -> str:
    """Text that identifies sources, files (path, size, modification time), seed and priority.

    It is equal if reading again would give the same sets.
    """
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
    console = Terminal()
    console.print(report_table(reports))
    for report in reports:
        first, *others = report.places
        more = f" and {len(others)} more files" if others else ""
        console.print(f"{report.split}: {first}{more}", soft_wrap=True, highlight=False)
    for line in shortages(reports, limits):
        console.print(line, style="yellow", soft_wrap=True)

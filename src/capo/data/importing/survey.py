"""Survey of a source: entries whose images can all be decoded, which can become prompts of a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from capo.data.importing.images import BrokenImage, check
from capo.data.importing.ordering import Entry, Place
from capo.data.importing.source import Source
from capo.data.pool.import_table import ImportTable
from capo.data.prompts.identity import entry_id
from capo.errors import InputError

NAMED = 10  # largest number of broken images named in a message; the report names all
BROKEN = "with a broken image"
REPEATED = "with one image twice"


def survey(source: Source, progress: bool = True) -> ImportTable:
    """Decode every image once and leave out entries with a broken image or one image twice.

    The report counts and names them.

    Returns the table of the entries kept. Raises InputError if no entry is left.
    """
    kept: list[Entry] = []
    broken: list[str] = []
    repeated: list[str] = []
    for entry in tqdm(
        source.entries, desc="checking images", unit="entry", disable=not progress, dynamic_ncols=True
    ):
        cells = [source.cell(place) for place in entry.places]
        named = zip(entry.places, cells, strict=True)
        faults = [fault for place, cell in named if (fault := _fault(source, place, cell))]
        broken += faults
        if not faults and _repeats(cells):
            repeated.append(source.row_of(entry.places[0]))
        elif not faults:
            kept.append(entry)
    dropped, first = dict(source.dropped), source.first_dropped
    if repeated:
        dropped[REPEATED], first[REPEATED] = len(repeated), repeated[0]
    if lost := len(source.entries) - len(kept) - len(repeated):
        dropped[BROKEN] = lost
    report = {"entries": len(kept), "dropped": dropped, "broken": broken, "first": first}
    if not kept:
        raise InputError(f"nothing to import: {described(report)}")
    return _table(kept, report)


def _fault(source: Source, place: Place, cell: Any) -> str | None:
    """Place and fault of an image that cannot be decoded; None for any other."""
    try:
        check(cell, source.images)
    except BrokenImage as error:
        return f"{source.where(place)}: {error}"
    return None


def _repeats(cells: Sequence[Any]) -> bool:
    """Whether two of an entry's images have the same bytes or path, between which there is no choice."""
    contents = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    return len({Path(image) if isinstance(image, str) else image for image in contents}) < len(contents)


def _table(kept: list[Entry], report: Mapping[str, Any]) -> ImportTable:
    seen: Counter[str] = Counter()
    ids = []
    for entry in kept:
        ids.append(entry_id(entry.caption, seen[entry.caption]))
        seen[entry.caption] += 1
    chosen = kept[0].ranks is not None
    ranks = np.array([entry.ranks for entry in kept], dtype=np.float32) if chosen else None
    report = {**report, "captions": len(seen)}
    return ImportTable(
        ids,
        [entry.caption for entry in kept],
        np.array([e.places for e in kept], dtype=np.int64),
        ranks,
        report,
    )


def described(report: Mapping[str, Any]) -> str:
    """Report in words: number of entries, how many were left out and why, and the first broken images."""
    first = report.get("first", {})  # pools of earlier versions have none
    reasons = ", ".join(
        f"{count} {reason}{f' (the first: {first[reason]})' if reason in first else ''}"
        for reason, count in sorted(report["dropped"].items())
    )
    captions = f" with {report['captions']} different captions" if "captions" in report else ""
    lines = [
        f"{report['entries']} entries{captions}; left out: {reasons or 'none'}",
        *report["broken"][:NAMED],
    ]
    if (more := len(report["broken"]) - NAMED) > 0:
        lines.append(f"and {more} more broken images")
    return "\n  ".join(lines)

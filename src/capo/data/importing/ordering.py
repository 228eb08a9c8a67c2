"""Who was preferred: cells -> ranks, and entries of one size (pure)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from capo.errors import InputError

Place = tuple[int, int, int]  # of an image in a source: table, row, number among the images of the row
TIE, UNLABELED, NO_CAPTION, TOO_FEW, UNEQUAL = (
    "ties",
    "without a choice",
    "without a caption",
    "with too few images",
    "with more or fewer ranks than images",
)


@dataclass(frozen=True)
class Entry:
    """A caption (normalized), its images, and their order: `ranks`, 0 the worst, equal where tied; None: nobody chose."""

    caption: str
    places: tuple[Place, ...]
    ranks: tuple[int, ...] | None


def unusable(caption: str, ranks: Sequence[int] | None) -> str | None:
    """Why an entry cannot be used; None where it can."""
    if not caption:
        return NO_CAPTION
    if ranks is None:
        return UNLABELED
    if len(ranks) < 2:
        return TOO_FEW
    return TIE if len(set(ranks)) == 1 else None


def number_of(value: object, where: str) -> float | None:
    """A cell as a number; None where it is empty or NaN. Raises InputError for what is no number."""
    try:
        number = math.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is {value!r}, which is no number") from error
    return None if math.isnan(number) else number


def numbers_of(values: object, where: str) -> list[float] | None:
    """A list of numbers; None where one of them is empty. Raises InputError for what is none."""
    if values is None:
        return None
    if not isinstance(values, list):
        raise InputError(f"{where} is {values!r}; it must be a list with one number an image")
    numbers = [number_of(value, where) for value in values]
    return None if None in numbers else numbers


def choice_of(value: object, where: str) -> tuple[int, int] | None:
    """label_0 -> ranks of the two images; None where nobody chose."""
    label = number_of(value, where)
    if label not in (None, 0.0, 0.5, 1.0):
        raise InputError(
            f"{where} is {value}; it must be 1 (the first image was chosen), 0 (the second) or 0.5 (a tie)"
        )
    return {None: None, 1.0: (1, 0), 0.0: (0, 1), 0.5: (0, 0)}[label]


def dense_ranks(values: Sequence[float], better: str) -> tuple[int, ...]:
    """Ranks from 0, the worst, without gaps; equal values share one. `better`: which values are, `lower` or `higher`."""
    order = sorted(set(values), reverse=better == "lower")
    places = {value: rank for rank, value in enumerate(order)}
    return tuple(places[value] for value in values)


def same_size(entries: Sequence[Entry], candidates: int | None, dropped: Counter[str]) -> list[Entry]:
    """Entries of `candidates` images each (by default what the smallest has): smaller ones are dropped, larger ones thinned."""
    count = candidates or min((len(entry.places) for entry in entries), default=2)
    large = [entry for entry in entries if len(entry.places) >= count]
    dropped[TOO_FEW] += len(entries) - len(large)
    return [thinned(entry, count) for entry in large]


def thinned(entry: Entry, count: int) -> Entry:
    """`count` of an entry's images: the best, the worst, and what lies evenly between; without ranks the first ones."""
    total = len(entry.places)
    if total == count:
        return entry
    if entry.ranks is None:
        return Entry(entry.caption, entry.places[:count], None)
    order = sorted(range(total), key=lambda i: -entry.ranks[i])
    kept = sorted(order[(2 * i * (total - 1) + count - 1) // (2 * (count - 1))] for i in range(count))
    return Entry(entry.caption, tuple(entry.places[i] for i in kept), tuple(entry.ranks[i] for i in kept))

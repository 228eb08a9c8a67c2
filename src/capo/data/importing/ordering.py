"""Order of imported images, as pure functions: cells -> ranks, and entries with equal numbers of images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capo.data.prompts import normalize
from capo.errors import InputError
from capo.runtime.limits import LETTERS

Place = tuple[int, int, int]  # place of an image in a source: table, row, number among the row's images
TIE, UNLABELED, NO_CAPTION, TOO_FEW, UNEQUAL = (
    "ties",
    "without a choice",
    "without a caption",
    "with too few images",
    "with more or fewer ranks than images",
)


@dataclass(frozen=True)
class Entry:
    """Normalized caption with the places of its images and their ranks.

    Rank 0 is the worst, tied images share a rank; None: the source has no choice for them.
    """

    caption: str
    places: tuple[Place, ...]
    ranks: tuple[int, ...] | None


class Dropped(Counter[str]):
    """Number of entries left out by reason; `first` has the place of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Place] = {}

    def drop(self, reason: str, place: Place) -> None:
        """Count an entry that cannot be used."""
        self[reason] += 1
        self.first.setdefault(reason, place)


def unusable(caption: str, ranks: Sequence[int] | None) -> str | None:
    """Reason why an entry cannot be used, or None if it can."""
    if not caption:
        return NO_CAPTION
    if ranks is None:
        return UNLABELED
    if len(ranks) < 2:
        return TOO_FEW
    return TIE if len(set(ranks)) == 1 else None


def caption_of(value: object, where: str) -> str:
    """Normalized caption in a cell, empty if the cell is.

    Raises InputError if the cell is not text, or longer than a prompt may be.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where} is {value!r}, which is not text; name the column of captions")
    try:
        caption = normalize(value).encode().decode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is {value!a}, which holds half a character; correct it") from error
    if len(caption) > LETTERS:
        raise InputError(f"{where} has {len(caption):,} letters, a prompt at most {LETTERS:,}: shorten it")
    return caption


def number_of(value: Any, where: str) -> float | None:
    """Number in a cell, None if it is empty or NaN; `where` names the cell.

    Raises InputError if the cell is not a finite number.
    """
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # 1_0 is 10 to Python alone
            raise ValueError
        number = math.nan if value is None or value == "" else float(value)
        if math.isinf(number):
            raise OverflowError
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where} is {value!r}, which is not a finite number; correct it") from error
    return None if math.isnan(number) else number


def numbers_of(values: object, where: str) -> list[float] | None:
    """List of numbers in a cell, None if one is empty. Raises InputError if it is not such a list."""
    if values is None:
        return None
    if not isinstance(values, list):
        raise InputError(f"{where} is {values!r}; it must be a list with one number per image")
    numbers = [number for value in values if (number := number_of(value, where)) is not None]
    return numbers if len(numbers) == len(values) else None


def choice_of(value: object, where: str) -> tuple[int, int] | None:
    """Ranks of two images from Pick-a-Pic's label_0; None if the cell is empty.

    Raises InputError for a label other than 0, 0.5 and 1.
    """
    label = number_of(value, where)
    if label not in (None, 0.0, 0.5, 1.0):
        raise InputError(
            f"{where} is {value}; it must be 1 (the first image was chosen), 0 (the second) or 0.5 (a tie)"
        )
    return {None: None, 1.0: (1, 0), 0.0: (0, 1), 0.5: (0, 0)}[label]


def dense_ranks(values: Sequence[float], better: str) -> tuple[int, ...]:
    """Ranks of values from 0, the worst, without gaps; equal values share a rank.

    better: `lower` or `higher`, whichever values are better.
    """
    order = sorted(set(values), reverse=better == "lower")
    places = {value: rank for rank, value in enumerate(order)}
    return tuple(places[value] for value in values)


def same_size(entries: Sequence[Entry], candidates: int | None, dropped: Dropped) -> list[Entry]:
    """Entries with `candidates` images each, by default as many as the smallest entry has.

    Smaller entries are dropped and counted in `dropped`, larger ones thinned.
    """
    count = candidates or min((len(entry.places) for entry in entries), default=2)
    for entry in entries:
        if len(entry.places) < count:
            dropped.drop(TOO_FEW, entry.places[0])
    return [thinned(entry, count) for entry in entries if len(entry.places) >= count]


def thinned(entry: Entry, count: int) -> Entry:
    """Entry with `count` of its images: the best, the worst and evenly spaced ones in between.

    Without ranks, the first images are kept.
    """
    total = len(entry.places)
    if total == count:
        return entry
    if entry.ranks is None:
        return Entry(entry.caption, entry.places[:count], None)
    ranks = entry.ranks
    order = sorted(range(total), key=lambda i: -ranks[i])
    kept = sorted(order[(2 * i * (total - 1) + count - 1) // (2 * (count - 1))] for i in range(count))
    return Entry(entry.caption, tuple(entry.places[i] for i in kept), tuple(ranks[i] for i in kept))

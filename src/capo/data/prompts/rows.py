"""Rows of a source: filtering of each row by itself, and the prompts of the chosen rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from capo.data.prompts.files import READERS, Batch, row_count
from capo.data.prompts.identity import Prompt, digest, make_prompt, normalize
from capo.data.prompts.sources import Columns, PromptFile, Source
from capo.errors import InputError
from capo.runtime.limits import LETTERS

FINE, EMPTY, NSFW, UNWANTED, TOO_LONG, DUPLICATE, ELSEWHERE, OVER_LIMIT, KEPT = range(9)  # outcomes of a row
YES, NO = ("true", "yes", "nsfw"), ("false", "no", "sfw", "safe")  # spellings of a boolean in text files
HIGHEST = 2.0  # of a score in 0-1: DiffusionDB writes 2 for a blurred picture
SLOW = 2.0  # seconds after which a progress bar is shown


def scan(source: Source, files: Sequence[PromptFile]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (R,) uint64 (0 for an empty prompt) and outcomes (R,) uint8 of all R rows of the files.

    The outcome is the first that applies of EMPTY, NSFW, UNWANTED and TOO_LONG, else FINE. A row takes 9
    bytes, whatever the length of its prompt. Raises InputError for files that cannot be read, and for a
    threshold above HIGHEST that no score in any of the files is above.
    """
    parts, start = [(np.zeros(0, np.uint64), np.zeros(0, np.uint8))], 0
    looked, above = "", source.nsfw is None or source.nsfw <= HIGHEST or math.isinf(source.nsfw)
    for place, columns, batch in _batches(source, files, "reading"):
        parts.append(_judge(batch, columns, source, place, start))
        start += len(batch[columns.text])
        if not above and columns.nsfw:
            looked = f"{place}, column {', '.join(map(repr, columns.nsfw))},"
            above = any(_is_above(value, place, source) for name in columns.nsfw for value in batch[name])
    if looked and not above:
        raise InputError(
            f"prompts.{source.split}.nsfw={source.nsfw}: no score of {looked} is above {HIGHEST:.0f}; give a "
            "threshold of their scale, such as 0.5, or nsfw=null for no filter"
        )
    ids, fates = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(fates)


def fetch(source: Source, files: Sequence[PromptFile], rows: np.ndarray) -> list[Prompt]:
    """Prompts of the rows with numbers `rows` (K,), in that order.

    The files are read a second time, so that only the chosen prompts are kept as Python objects.
    """
    order = np.argsort(rows)
    ascending, start = rows[order], 0
    prompts: dict[int, Prompt] = {}
    for _, columns, batch in _batches(replace(source, nsfw=None, where=None), files, "fetching"):
        texts = batch[columns.text]
        low, high = np.searchsorted(ascending, [start, start + len(texts)])
        for place, row in zip(order[low:high].tolist(), (ascending[low:high] - start).tolist(), strict=True):
            category = batch[columns.category][row] if columns.category else None
            prompts[place] = make_prompt(texts[row], "" if category is None else str(category))
        start += len(texts)
    return [prompts[place] for place in range(len(rows))]


def _batches(source: Source, files: Sequence[PromptFile], verb: str) -> Iterator[tuple[str, Columns, Batch]]:
    """Batches (place, columns, batch) of the columns that `source` reads, over all files."""
    counts = [row_count(file.path, file.form) for file in files]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else None
    description = f"prompts.{source.split}: {verb}"
    with tqdm(
        desc=description, total=total, unit="row", unit_scale=True, delay=SLOW, leave=False, disable=None
    ) as bar:
        for file in files:
            for batch in READERS[file.form](
                file.path, file.place, lambda names, file=file: source.columns(names, file.place).all
            ):
                columns = source.columns(list(batch), file.place)
                yield file.place, columns, batch
                bar.update(len(batch[columns.text]))


def _judge(
    batch: Batch, columns: Columns, source: Source, place: str, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and outcomes of a batch whose first row is row number `start` of its split."""
    longest = LETTERS if source.max_length is None else source.max_length
    ids, fates = [], []
    for row, text in enumerate(batch[columns.text], start + 1):
        clean = _clean(text, f"{place}: row {row}", source.split)
        ids.append(int.from_bytes(digest(clean)) if clean else 0)
        fates.append(EMPTY if not clean else TOO_LONG if len(clean) > longest else FINE)
    found = np.array(fates, np.uint8)
    for name, wanted in (source.where or {}).items():
        found[[not _same(value, wanted) for value in batch[name]]] = UNWANTED
    threshold = math.inf if source.nsfw is None else source.nsfw  # without one no column is read for it
    for name in columns.nsfw:
        reached = partial(
            _is_nsfw, threshold=threshold, place=f"{place}: column '{name}'", split=source.split
        )
        found[list(map(reached, batch[name]))] = NSFW
    found[np.array(fates) == EMPTY] = EMPTY
    return np.array(ids, np.uint64), found


def _clean(text: object, place: str, split: str) -> str:
    """Normalized text of a cell, "" if it is empty. Raises InputError if the cell is not text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"{place}: the prompt is {text!r}, not text; name another column: prompts.{split}.column=..."
        )
    clean = normalize(text)
    if not clean.isascii() and any("\ud800" <= letter <= "\udfff" for letter in clean):
        raise InputError(f"{place}: {clean!a} contains an unpaired surrogate, half a character; correct it")
    return clean


def _is_above(value: object, place: str, source: Source) -> bool:
    """Whether an NSFW score is above HIGHEST, as none in 0-1 is; so is a boolean that is true."""
    return _is_nsfw(value, math.nextafter(HIGHEST, math.inf), place, source.split)


def _is_nsfw(value: object, threshold: float, place: str, split: str) -> bool:
    """Whether an NSFW score reaches the threshold or an NSFW boolean is true; a missing value is NSFW."""
    if isinstance(value, float | int) and not isinstance(value, bool):
        return not value < threshold  # NaN counts as missing
    word = "" if value is None else str(value).strip().lower()
    if word in ("", *YES, *NO):
        return word not in NO
    try:
        return not float(word) < threshold
    except ValueError:
        raise InputError(
            f"{place} holds '{value}', which is neither an NSFW score nor a boolean; name the NSFW columns: "
            f"prompts.{split}.nsfw_columns=[...], or turn the filter off: prompts.{split}.nsfw=null"
        ) from None


def _same(value: object, wanted: object) -> bool:
    """Whether a cell equals the value in `where`, ignoring case (text files write True or true)."""
    return value == wanted or str(value).strip().lower() == str(wanted).strip().lower()

"""The rows of a source: what becomes of each judged by itself, and the prompts of those that are chosen."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from capo.data.prompts.files import READERS, Batch, row_count
from capo.data.prompts.identity import Prompt, digest, make_prompt, normalize
from capo.data.prompts.sources import Columns, PromptFile, Source
from capo.errors import InputError

FINE, EMPTY, NSFW, UNWANTED, TOO_LONG, DUPLICATE, ELSEWHERE, OVER_LIMIT, KEPT = range(
    9
)  # what becomes of a row
YES, NO = ("true", "yes", "nsfw"), ("false", "no", "sfw", "safe")  # what files of text write for a switch
SLOW = 2.0  # seconds after which reading shows its progress


def scan(source: Source, files: Sequence[PromptFile]) -> tuple[np.ndarray, np.ndarray]:
    """(R,) uint64 ids (0: empty) and (R,) uint8 fates of all rows: 9 bytes a row, whatever the prompts' length.

    A fate here is EMPTY, NSFW, UNWANTED, TOO_LONG, the first of them that holds, or FINE. Raises InputError for files that cannot be read.
    """
    parts, start = [(np.zeros(0, np.uint64), np.zeros(0, np.uint8))], 0
    for place, columns, batch in _batches(source, files, "reading"):
        parts.append(_judge(batch, columns, source, place, start))
        start += len(batch[columns.text])
    ids, fates = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(fates)


def fetch(source: Source, files: Sequence[PromptFile], rows: np.ndarray) -> list[Prompt]:
    """The prompts of `rows` (K,) in their order, from a second reading: only these become Python objects that stay."""
    order = np.argsort(rows)
    ascending, start = rows[order], 0
    prompts: list[Prompt | None] = [None] * len(rows)
    for _, columns, batch in _batches(replace(source, nsfw=None, where={}), files, "fetching"):
        texts = batch[columns.text]
        low, high = np.searchsorted(ascending, [start, start + len(texts)])
        for place, row in zip(order[low:high].tolist(), (ascending[low:high] - start).tolist(), strict=True):
            category = batch[columns.category][row] if columns.category else None
            prompts[place] = make_prompt(texts[row], "" if category is None else str(category))
        start += len(texts)
    return prompts


def _batches(source: Source, files: Sequence[PromptFile], verb: str) -> Iterator[tuple[str, Columns, Batch]]:
    """(place, columns, batch) of the columns that `source` reads, of every file."""
    counts = [row_count(file.path, file.form) for file in files]
    total = None if None in counts else sum(counts)
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
    """Ids and fates of a batch whose first row is row `start` of its split."""
    longest = sys.maxsize if source.max_length is None else source.max_length
    ids, fates = [], []
    for row, text in enumerate(batch[columns.text], start + 1):
        clean = _clean(text, f"{place}: row {row}", source.split)
        ids.append(int.from_bytes(digest(clean)) if clean else 0)
        fates.append(EMPTY if not clean else TOO_LONG if len(clean) > longest else FINE)
    found = np.array(fates, np.uint8)
    for name in columns.where:
        found[[not _same(value, source.where[name]) for value in batch[name]]] = UNWANTED
    for name in columns.nsfw:
        reached = partial(
            _is_nsfw, threshold=source.nsfw, place=f"{place}: column '{name}'", split=source.split
        )
        found[list(map(reached, batch[name]))] = NSFW
    found[np.array(fates) == EMPTY] = EMPTY
    return np.array(ids, np.uint64), found


def _clean(text: object, place: str, split: str) -> str:
    """The normalized text of a cell, "" where it is empty. Raises InputError for what is no text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"{place}: the prompt is {text!r}, not text; name another column: prompts.{split}.column=..."
        )
    clean = normalize(text)
    if not clean.isascii() and any("\ud800" <= letter <= "\udfff" for letter in clean):
        raise InputError(f"{place}: {clean!a} holds half a character; correct it")
    return clean


def _is_nsfw(value: object, threshold: float, place: str, split: str) -> bool:
    """Whether a score reaches the threshold, or a switch is on; what is missing is not known to be safe."""
    if type(value) in (float, int):
        return not value < threshold  # NaN is missing too
    word = "" if value is None else str(value).strip().lower()
    if word in ("", *YES, *NO):
        return word not in NO
    try:
        return not float(word) < threshold
    except ValueError:
        raise InputError(
            f"{place} holds '{value}', which is no NSFW score and no switch; name the columns that are: "
            f"prompts.{split}.nsfw_columns=[...], or filter nothing: prompts.{split}.nsfw=null"
        ) from None


def _same(value: object, wanted: object) -> bool:
    """Whether a cell holds the value that `where` asks for; files of text write true as True or true."""
    return value == wanted or str(value).strip().lower() == str(wanted).strip().lower()

"""Identity of a prompt: its normalized text, its id, and the seeds derived from the id."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capo.errors import InputError
from capo.runtime.limits import LETTERS

SPLITS = "train", "validation", "test"
MAKE = "make each one with capo.data.prompts.make_prompt(text)"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt with normalized text; `id` is a function of `text` alone, `category` is used in reports."""

    id: str
    text: str
    category: str = ""


def normalize(text: str) -> str:
    """Normalize to Unicode NFC, strip the text, and replace every run of white space by one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def digest(normalized: str) -> bytes:
    """Hash, 8 bytes, of an already normalized text."""
    return hashlib.blake2b(normalized.encode(), digest_size=8).digest()


def prompt_id(text: str) -> str:
    """Prompt id, 16 hex digits: a hash of the normalized text, equal on all machines."""
    return digest(normalize(text)).hex()


def entry_id(normalized: str, occurrence: int) -> str:
    """Id, 16 hex digits, of the entry number `occurrence` of a pool with a normalized text.

    The first entry has the id of the prompt; later ones, which imported pools have, a hash of text and
    number, joined by a line break. A normalized text never contains a line break, so this is not the id of
    another text.
    """
    return digest(f"{normalized}\n{occurrence}" if occurrence else normalized).hex()


def make_prompt(text: str, category: str = "") -> Prompt:
    """Make a prompt from a text, which is stored normalized, so that equal ids mean equal embeddings."""
    text = normalize(text)
    return Prompt(digest(text).hex(), text, category)


def candidate_seed(pool_seed: int, prompt_id: str, index: int) -> int:
    """Seed in [0, 2^63) of candidate `index` of a prompt, a function of these three arguments alone.

    It allows a pool to be resumed, extended and checked in any order and by any number of processes.
    """
    hashed = hashlib.blake2b(f"{pool_seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed) >> 1


def check_source(source: str, splits: object) -> None:
    """Raise InputError, beginning with `source`, unless it returned a list of `Prompt` for each of SPLITS."""
    must = "; it must return a list of Prompt for each of train, validation and test"
    if not isinstance(splits, Mapping):
        raise InputError(f"{source} returned a {type(splits).__name__}{must}")
    if set(splits) != set(SPLITS):
        raise InputError(f"{source} returned the splits {', '.join(map(repr, splits)) or 'of no name'}{must}")
    for split, prompts in splits.items():
        if not isinstance(prompts, Sequence):
            raise InputError(f"{source}: '{split}' is a {type(prompts).__name__}{must}")
        for number, prompt in enumerate(prompts, start=1):
            if not isinstance(prompt, Prompt):
                raise InputError(f"{source}: {split} prompt {number} is {_short(prompt)}{must}; {MAKE}")
            if not _is_made(prompt):
                fault = "which is not what make_prompt makes of its text"
                raise InputError(f"{source}: {split} prompt {number} is {_short(prompt)}, {fault}; {MAKE}")


def _is_made(prompt: Prompt) -> bool:
    texts = isinstance(prompt.text, str) and isinstance(prompt.category, str)
    try:
        return texts and make_prompt(prompt.text, prompt.category) == prompt
    except UnicodeEncodeError:  # half a character
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_splits(splits: Mapping[str, Sequence[Prompt]]) -> None:
    """Raise InputError for a split without prompts, an empty or endless one, and a duplicate in any split.

    Training on a validation or test prompt would silently invalidate its win-rate.
    """
    places: dict[str, tuple[str, int]] = {}
    for split, prompts in splits.items():
        if not prompts:
            raise InputError(f"prompts '{split}': the set is empty; it needs at least one prompt")
        for number, prompt in enumerate(prompts, start=1):
            if not prompt.text:
                raise InputError(f"{split} prompt {number} is empty: remove it")
            if len(prompt.text) > LETTERS:
                raise InputError(
                    f'{split} prompt {number} ("{prompt.text[:40]}...") has {len(prompt.text):,} letters, '
                    f"more than the {LETTERS:,} that a prompt may have: shorten it, or leave it out"
                )
            if prompt.id in places:
                other, there = places[prompt.id]
                raise InputError(
                    f'{split} prompt {number} ("{prompt.text}") is also {other} prompt {there}: remove one '
                    "of the two (differences in white space are ignored)"
                )
            places[prompt.id] = split, number

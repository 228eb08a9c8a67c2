"""What a prompt is: its normalized text, its id, and the seeds that follow from it."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capo.errors import InputError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in its normalized form; `id` follows from `text` alone, `category` is for reports."""

    id: str
    text: str
    category: str = ""


def normalize(text: str) -> str:
    """Unicode NFC, outer white space removed, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def digest(normalized: str) -> bytes:
    """8 bytes: the hash of a text that is normalized already."""
    return hashlib.blake2b(normalized.encode(), digest_size=8).digest()


def prompt_id(text: str) -> str:
    """16 hex digits: a hash of the normalized text, the same on every machine."""
    return digest(normalize(text)).hex()


def make_prompt(text: str, category: str = "") -> Prompt:
    """The prompt of `text`. The text is kept normalized, so that equal ids mean equal embeddings."""
    text = normalize(text)
    return Prompt(digest(text).hex(), text, category)


def candidate_seed(pool_seed: int, prompt_id: str, index: int) -> int:
    """Seed in [0, 2^63) of a prompt's candidate `index`: a function of these three alone (FORMULAS 6).

    So a pool can be resumed, extended and checked in any order and by any number of processes.
    """
    hashed = hashlib.blake2b(f"{pool_seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed) >> 1


def check_splits(splits: Mapping[str, Sequence[Prompt]]) -> None:
    """Raises InputError for a split without prompts, an empty prompt, or a prompt that stands twice anywhere.

    A validation or test prompt that was trained on would make its win-rate worthless without a sign of it.
    """
    places: dict[str, tuple[str, int]] = {}
    for split, prompts in splits.items():
        if not prompts:
            raise InputError(f"prompts '{split}': the set is empty; it needs at least one prompt")
        for number, prompt in enumerate(prompts, start=1):
            if not prompt.text:
                raise InputError(f"{split} prompt {number} is empty: take it out")
            if prompt.id in places:
                other, there = places[prompt.id]
                raise InputError(
                    f'{split} prompt {number} ("{prompt.text}") is also {other} prompt {there}: take one of the '
                    "two out (white space does not count)"
                )
            places[prompt.id] = split, number

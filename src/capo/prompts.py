"""Prompts: their identity, the seeds that follow from it, and prompt sets read from text files."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capo.errors import InputError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in its normalised form; `id` follows from `text` alone, `category` is for reports."""

    id: str
    text: str
    category: str = ""


def normalise(text: str) -> str:
    """Unicode NFC, outer white space removed, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def prompt_id(text: str) -> str:
    """16 hex digits: a hash of the normalised text, the same on every machine."""
    return hashlib.blake2b(normalise(text).encode(), digest_size=8).hexdigest()


def make_prompt(text: str, category: str = "") -> Prompt:
    """The prompt of `text`. The text is kept normalised, so that equal ids mean equal embeddings."""
    return Prompt(prompt_id(text), normalise(text), category)


def candidate_seed(pool_seed: int, prompt_id: str, index: int) -> int:
    """Seed in [0, 2^63) of a prompt's candidate `index`: a function of these three alone (FORMULAS 6).

    So a pool can be resumed, extended and checked in any order and by any number of processes.
    """
    digest = hashlib.blake2b(f"{pool_seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def check_splits(splits: Mapping[str, Sequence[Prompt]]) -> None:
    """Raises InputError for a split without prompts, an empty prompt, or a prompt that stands twice anywhere.

    A validation or test prompt that was trained on would make its win-rate worthless without a sign of it.
    """
    places: dict[str, str] = {}
    for split, prompts in splits.items():
        if not prompts:
            raise InputError(f"prompts '{split}': the set is empty; it needs at least one prompt")
        for number, prompt in enumerate(prompts, start=1):
            place = f"{split} prompt {number}"
            if not prompt.text:
                raise InputError(f"{place} is empty: take it out")
            if prompt.id in places:
                raise InputError(f'{place} ("{prompt.text}") is also {places[prompt.id]}: take one of the '
                                 "two out (white space does not count)")
            places[prompt.id] = place


def text_files(train: str | Path, validation: str | Path, test: str | Path) -> dict[str, list[Prompt]]:
    """Prompt sets from UTF-8 text files, one prompt a line; lines without text are passed over.

    Raises InputError for a file that cannot be read, is not UTF-8 text or holds no prompt, and for whatever
    `check_splits` refuses.
    """
    files = {"train": train, "validation": validation, "test": test}
    splits = {split: _read_lines(split, Path(file).expanduser()) for split, file in files.items()}
    check_splits(splits)
    return splits


def _read_lines(split: str, file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # -sig: a byte order mark is no prompt
    except OSError as error:
        raise InputError(f"prompts.{split}={file}: cannot be read ({error.strerror}); "
                         "give the path of a text file with one prompt a line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts.{split}={file}: not UTF-8 text (byte {error.start}); save it as "
                         "UTF-8") from error
    prompts = [make_prompt(line) for line in lines if normalise(line)]
    if not prompts:
        raise InputError(f"prompts.{split}={file}: no prompt in it; write one prompt a line")
    return prompts

"""Read the official lists of benchmarks, and what official scorers wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capo.data.prompts.text import decoded_lines
from capo.errors import InputError
from capo.runtime.hub import hub_file
from capo.runtime.reading import parse_writable
from capo.runtime.schema import shown

KEY = "benchmark.set"


def official_file(
    path: str | None, what: str, hub: str | None = None, name: str = "", revision: str | None = None
) -> tuple[Path, str]:
    """Find the file or folder of an official list: the user's, or that of a hub data set.

    Args:
        path: the user's file or folder, or None.
        what: what it is and where it is published, for messages.
        hub: the data set that holds it, or None if it is on no hub.
        name: its file in the data set.
        revision: commit of the data set; None: main.

    Returns:
        Its path, and its name in messages.

    Raises:
        InputError: neither is given, or it is not there.
    """
    if path is not None:
        place, found = f"{KEY}.path={path}", Path(path).expanduser()
        if not found.exists():
            raise InputError(f"{place}: no such file or folder; give the path of {what}")
        return found, place
    if hub is None:
        raise InputError(f"{KEY}.path is not given; give the path of {what}")
    return hub_file(hub, name, revision, KEY), f"{KEY}: {hub}/{name}"


def official_json(path: Path, place: str) -> Any:
    """Read a JSON file; InputError if it is none."""
    try:
        return parse_writable("".join(decoded_lines(path, place)))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{place}: {error}; get the file again") from error


def read_records(path: Path, place: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a JSON Lines file: (line, its object) of each line. InputError for a line without an object."""
    found = []
    for number, line in enumerate(decoded_lines(path, place), start=1):
        try:
            record = parse_writable(line)
        except ValueError as error:
            raise InputError(
                f"{place}: line {number} {str(error).removeprefix('it ')}; get the file again"
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{place}: line {number} is no JSON object; get the file again")
        found.append((line.strip(), record))
    return found


def text_of(record: object, key: str, place: str) -> str:
    """Text at `key` of a record; InputError if there is none."""
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise InputError(f"{place}: '{key}' is {value!r}, not text; give the official file")
    return value


def entries_of(value: object, place: str) -> list[Any]:
    """Entries of a JSON list; InputError for any other value."""
    if not isinstance(value, list):
        raise InputError(f"{place}: it holds {shown(value)}, not a list; give the official file")
    return value


def number_of(value: object, place: str) -> float:
    """Finite number that a JSON value is, or that its text says; InputError, which names `place`, if none."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise InputError(f"{place} is {shown(value)}, not a finite number; give the official file") from error
    return number


def index_of(value: object, place: str) -> int:
    """Whole number from 0 on that a JSON value is, or that its digits say; InputError if it is none."""
    number = number_of(value, place)
    if number < 0 or number != int(number) or number >= 2**53:
        raise InputError(f"{place} is {shown(value)}, not a whole number from 0 on; give the official file")
    return int(number)


def add_figure(
    values: dict[int, dict[int, float]], prompt: int, image: int, figure: float, place: str
) -> None:
    """Add the figure of a prompt's image to `values`.

    Raises InputError, which names `place`, for a second one, and for one that no official scorer gives: all
    are shares or cosines.
    """
    if not -1 <= figure <= 1:
        raise InputError(f"{place}: the figure {figure:g} is not from -1 to 1; run the scorer again")
    if image in values.setdefault(prompt, {}):
        raise InputError(
            f"{place}: image {image} of prompt {prompt} has a figure already; remove one of both"
        )
    values[prompt][image] = figure


def means(values: Mapping[int, Mapping[int, float]], prompts: int, images: int, place: str) -> Tensor:
    """Mean over its images of each prompt, (P,) float64.

    Args:
        values: number of a prompt -> number of an image -> its figure (`add_figure`).
        prompts: number of prompts, P.
        images: number of images that each must have.
        place: name of the results in messages.

    Raises:
        InputError: a prompt lacks figures or has more, or a prompt is unknown.
    """
    if unknown := sorted(set(values) - set(range(prompts))):
        raise InputError(
            f"{place}: it has prompt {unknown[0]}, but the list has {prompts}: it belongs to another list"
        )
    wrong = [number for number in range(prompts) if len(values.get(number, ())) != images]
    if wrong:
        raise InputError(
            f"{place}: {len(wrong)} of {prompts} prompts do not have figures of {images} images (the first "
            f"is prompt {wrong[0]}, with {len(values.get(wrong[0], ()))}); let the scorer read the whole tree"
        )
    rows = [list(values[number].values()) for number in range(prompts)]
    return torch.tensor(rows, dtype=torch.float64).mean(1)

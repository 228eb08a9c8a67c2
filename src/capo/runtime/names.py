"""Names that become parts of paths: of a model, a reward or a split."""

from __future__ import annotations

import re

from capo.errors import InputError

LONGEST = 100  # characters; a pool's folder adds about 40, and file systems take 255
NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{LONGEST}}}")
MUST = (
    f"must be a name of at most {LONGEST} letters (A-Z, a-z), digits, dots, _ and -, not of dots alone, "
    "since folders are called by it"
)


def is_name(text: object) -> bool:
    """Whether `text` may be a part of a path."""
    return isinstance(text, str) and NAME.fullmatch(text) is not None and text.strip(".") != ""


def check_name(what: str, name: object) -> None:
    """Raise InputError if the name of `what` may not be a part of a path."""
    if not is_name(name):
        raise InputError(f"{what} {name!r}: {MUST}; choose another name")

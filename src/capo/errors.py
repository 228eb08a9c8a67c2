"""Errors that a user's value caused, as opposed to faults of this package, and what their messages share."""

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """A value that the user gave cannot be used; the message names the value, the place and the remedy."""


def closest(word: str, words: Sequence[str], count: int = 1) -> list[str]:
    """Up to `count` of `words` that are most like `word`, ignoring case; empty where none is similar."""
    by_lower = {name.lower(): name for name in words}
    return [by_lower[name] for name in difflib.get_close_matches(word.lower(), list(by_lower), count, 0.6)]


def first_line(error: Exception) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

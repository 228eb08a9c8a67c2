"""Print to a terminal: values come from users and from files, and are shown as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

# all but line feed and tab, and what turns the direction of writing: they could rewrite a screen
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

PLAIN = re.compile(r"[\w./-]+", re.ASCII)
# what Hydra needs escaped between single quotes: a quote, a reference, and backslashes before these
ESCAPED, LAST = re.compile(r"(\\*)('|\$\{)"), re.compile(r"(\\+)\Z")


def printable(text: str) -> str:
    """Return the text with its control characters written out, as in Python's strings."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def typed(key: str, value: str | Path) -> str:
    """The argument `key=value` as a command line takes it: quoted for Hydra, and for the shell.

    A value of letters, digits and `_./-` needs no quotes.
    """
    text = str(value)
    if not PLAIN.fullmatch(text):
        inner = LAST.sub(r"\1\1", ESCAPED.sub(r"\1\1\\\2", text))
        text = f"'{inner}'"
    return shlex.quote(f"{key}={text}")


class Terminal(Console):
    """Console that takes no text for markup, an emoji or an escape sequence; styles are arguments."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)
        if self.width < 1:
            self.width = 80  # COLUMNS=0: not a line would be printed

    def render_str(self, text: str, **options: Any) -> Text:  # tables call it for their cells too
        return super().render_str(printable(text), **options)

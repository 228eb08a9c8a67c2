"""Rules for the values of a configuration: a condition, and its words in a message."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from capo.errors import closest
from capo.runtime.names import MUST, is_name


@dataclass(frozen=True)
class Rule:
    """Condition on a value, in words and as a test; `choices`: the allowed words, if there is a list."""

    words: str
    holds: Callable[[Any], bool]
    choices: Sequence[str] = ()

    def fault(self, key: str, value: object) -> str | None:
        """Message `key=value: must be ...`, or None if the value is valid."""
        if self.holds(value):
            return None
        near = closest(str(value), self.choices)
        return f"{key}={shown(value)}: must be {self.words}" + (f"; did you mean {near[0]}?" if near else "")


def whole(low: int | None = None, high: int | None = None) -> Rule:
    """Rule for an integer from `low` to `high`, without a limit where that is None."""
    span = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"

    def holds(value: Any) -> bool:
        return type(value) is int and (low is None or value >= low) and (high is None or value <= high)

    return Rule(f"a whole number{span}", holds)


def number(above: float | None = None, least: float | None = None) -> Rule:
    """Rule for a finite number, greater than `above` and at least `least` if given."""

    def holds(value: Any) -> bool:
        return (
            type(value) in (int, float)
            and math.isfinite(value)
            and (above is None or value > above)
            and (least is None or value >= least)
        )

    low = "" if least is None else f" of at least {least}"
    return Rule(f"a finite number{low}" if above is None else f"a finite number above {above}", holds)


def one_of(names: Sequence[str]) -> Rule:
    """Rule for one of the words `names`."""
    return Rule(f"one of {', '.join(names)}", lambda value: value in names, tuple(names))


def optional(rule: Rule) -> Rule:
    """Rule for a value that fulfills `rule` or is null."""
    return replace(
        rule, words=f"{rule.words}, or null", holds=lambda value: value is None or rule.holds(value)
    )


SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
PATH_NAME = Rule(MUST.removeprefix("must be "), is_name)
TEXT = Rule("text", lambda value: isinstance(value, str) and value != "")
# the folder of a sweep's job is a number, which the command line reads as one
FOLDER = Rule(
    "a folder, written with a / where its name reads as something else (run=./1e3)",
    lambda value: TEXT.holds(value) or type(value) is int,
)


def _one_or_more(value: Any) -> bool:
    return all(map(FOLDER.holds, value)) and bool(value) if isinstance(value, list) else FOLDER.holds(value)


FOLDERS = Rule(
    "a folder or a list of folders, written with a / where a name reads as something else (runs=[./1e3])",
    _one_or_more,
)
FILES = Rule(
    "a file or a list of files, written with a / where a name reads as something else (results=./1)",
    _one_or_more,
)
NAMES = Rule("a list of names", lambda value: isinstance(value, list) and all(map(TEXT.holds, value)))
SEED = whole(0, 2**63 - 2)  # the zero line's seed is the next one


def shown(value: object) -> str:
    """Format a value as on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)

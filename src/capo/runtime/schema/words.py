"""Types of a schema in words: what a value must be, for messages and for the documentation."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

SIGNS = {"gt": "above", "lt": "below", "le": "at most"}  # constraint -> its word
MOST = 8  # keys of a section that a message lists


@dataclass(frozen=True)
class Said:
    """Words for a type that say more than its parts do: `Annotated[..., Said("a folder")]`."""

    words: str


def words(kind: Any) -> str:
    """Say what a value of a type must be: `a whole number of at least 1, or null`."""
    if (said := _said(kind)) is not None:
        return said
    bounds, kind = _bounds(kind)
    if get_origin(kind) in (Union, types.UnionType):
        members = get_args(kind)
        told = " or ".join(dict.fromkeys(words(part) for part in members if part is not type(None)))
        return f"{told}, or null" if type(None) in members else told
    if get_origin(kind) is Literal:
        return _literal(get_args(kind))
    if get_origin(kind) is list:
        return f"a list, of which each entry is {words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"{words(get_args(kind)[1])}, by name"
    if kind is int:
        return f"a whole number{_span(bounds)}"
    if kind is float:
        return f"a finite number{_span(bounds)}"
    plain = {bool: "true or false", str: "text", type(None): "null", Any: "any value"}
    return plain[kind] if kind in plain else _section(kind)


def _literal(values: tuple) -> str:
    if len(values) == 1:
        return {True: "true", False: "false"}.get(values[0], str(values[0]))
    return f"one of {', '.join(map(str, values))}"


def choices(kind: Any) -> list[str]:
    """Words that a value may be, if the type lists them."""
    if get_origin(kind) is Annotated:
        return choices(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if isinstance(value, str)]
    if get_origin(kind) in (Union, types.UnionType):
        return [name for part in get_args(kind) for name in choices(part)]
    return []


def _said(kind: Any) -> str | None:
    for mark in getattr(kind, "__metadata__", ()):
        found = getattr(mark, "words", None) or getattr(mark, "said", None)
        if isinstance(found, str):
            return found
    return None


def _bounds(kind: Any) -> tuple[dict[str, float], Any]:
    """Limits of a number's type, and the type without them."""
    found: dict[str, float] = {}
    while get_origin(kind) is Annotated:
        for limit in _limits(kind.__metadata__):
            for name in ("gt", "ge", "lt", "le"):
                if (value := getattr(limit, name, None)) is not None:
                    found[name] = value
        kind = get_args(kind)[0]
    return found, kind


def _limits(marks: Iterable[Any]) -> Iterable[Any]:
    for mark in marks:
        yield from getattr(mark, "metadata", ()) or (mark,)  # pydantic's Field holds its limits in a list


def _span(bounds: dict[str, float]) -> str:
    if set(bounds) == {"ge", "le"}:
        return f" from {bounds['ge']} to {bounds['le']}"
    told = [f"of at least {bounds['ge']}"] if "ge" in bounds else []
    told += [f"{SIGNS[name]} {bounds[name]}" for name in ("gt", "lt", "le") if name in bounds]
    return f" {' and '.join(told)}" if told else ""


def _section(kind: Any) -> str:
    names = [info.alias or name for name, info in kind.model_fields.items()]
    return f"a section of keys ({listed(names)})" if names else "a section without keys"


def listed(names: Sequence[str]) -> str:
    """List names in a message, the first ones of many."""
    return ", ".join(names[:MOST]) + (", ..." if len(names) > MOST else "")

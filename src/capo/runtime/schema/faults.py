"""Compare values with a schema, and say in one message each what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from capo.errors import alike, closest
from capo.runtime.schema.tree import (
    GROUP,
    LATER,
    Node,
    Section,
    adapter,
    every_key,
    is_section,
    names_of,
    picked,
)
from capo.runtime.schema.words import choices, listed, words

MISSING = "???"  # OmegaConf's mandatory value that is not given
TOP_GROUPS = ("experiment",)  # groups of conf/ whose files hold keys of any section, not a section
LONGEST = 400  # characters of a value in a message
NO_KEY, NO_ARGUMENT = "there is no such key", "takes no such argument"


def faults(schema: type[Section], values: object, *, partial: bool = False) -> dict[str, str]:
    """Compare plain values with a schema.

    Args:
        schema: the schema.
        values: plain values; `???` counts as not given.
        partial: whether keys may be absent, as in files that an earlier version wrote.

    Returns:
        Key -> message `key=value: must be ...`; empty if everything can be used.
    """
    given, open_keys = _given(values)
    try:
        schema.model_validate(given)
    except ValidationError as error:
        found: dict[str, str] = {}
        for entry in error.errors(include_url=False, include_context=False, include_input=False):
            place, message = _fault(schema, entry["type"], entry["loc"], given, open_keys, partial)
            if message:
                found.setdefault(place, message)
        return found
    except (OverflowError, ValueError, RecursionError) as error:  # numbers and nesting beyond pydantic's own
        return {"": f"the values cannot be read ({error})"}
    return {}


def fault(kind: Any, name: str, value: object) -> str | None:
    """Message where one value is not of a plain type, else None."""
    try:
        adapter(kind).validate_python(value, strict=True)
    except (ValidationError, OverflowError):
        return refused(name, value, kind)
    return None


def refused(name: str, value: object, kind: Any) -> str:
    """Message `key=value: must be ...; did you mean ...?`."""
    near = closest(value, choices(kind)) if isinstance(value, str) else []
    key = shown(name)
    told = f"{key}={shown(value)}: must be {words(kind)}"
    if isinstance(value, str) and _is_quoted(value, kind):
        return f"{told}, and '{value}' is text; leave its quotes out, or write ${{oc.decode:${{oc.env:...}}}}"
    if near:
        return f"{told}; did you mean {near[0]}?"
    return f"{told}; leave {key} out, or give {key}.KEY=VALUE" if is_section(kind) else told


def _is_quoted(text: str, kind: Any) -> bool:
    """Whether a value of the type was meant by a text, but for its quotes."""
    try:
        value = json.loads(text.lower()) if len(text) <= LONGEST else text
    except (ValueError, RecursionError):
        return False
    return not isinstance(value, str) and fault(kind, "", value) is None


def _given(values: object) -> tuple[Any, set[tuple]]:
    """Leave out what is not given; return the rest, and the paths of what was left out."""
    left: set[tuple] = set()

    def walk(node: object, path: tuple) -> Any:
        if isinstance(node, Mapping):
            left.update((*path, name) for name, value in node.items() if _is_missing(value))
            return {n: walk(value, (*path, n)) for n, value in node.items() if not _is_missing(value)}
        return node

    return walk(values, ()), left


def _is_missing(value: object) -> bool:
    return isinstance(value, str) and value == MISSING


def _fault(
    schema: type[Section], kind: str, loc: Sequence[object], values: Any, left: set[tuple], partial: bool
) -> tuple[str, str | None]:
    """Key and message of one error of pydantic; no message for what is to be passed over."""
    node, value, path = Node(schema), values, tuple[object, ...]()
    for part in loc:
        below = node.child(part, value)
        if below is None or part == "[key]" or not (isinstance(value, Mapping) and part in value):
            break
        node, value, path = below, value[part], (*path, part)
    else:
        return dotted(path), refused(dotted(path), value, node.type)
    name = dotted((*path, part))
    if kind == "missing":
        if partial or below is None or ((*path, part) in left and below.extra.get(LATER)):
            return name, None
        return name, _missing(name, below)
    if part == "[key]":
        told = f"{dotted(path[:-1])}={shown([*path][-1])}: must be {_name_words(schema, path, values)}"
        return dotted(path), told
    if kind in ("extra_forbidden", "invalid_key") and isinstance(value, Mapping) and part in value:
        return name, _unknown(schema, node, path, part, value)
    return dotted(path), refused(dotted(path), value, node.type)


def _name_words(schema: type[Section], path: Sequence[object], values: Any) -> str:
    node = Node(schema)
    for part in path[:-1]:
        node, values = node.child(part, values) or node, values[part]
    return words(next(get_args(kind)[0] for kind in node.sections if get_origin(kind) is dict))


def _missing(name: str, node: Node) -> str:
    if node.extra.get(GROUP):
        group = node.extra[GROUP]
        choice = name if group == name else f"{group}@{name}"
        return f"{name}: nothing is chosen; give {choice}=NAME, a file of conf/{group}/"
    key = shown(name)  # names in it may be of any length
    give = f"{key}.KEY=VALUE" if is_section(node.type) else f"{key}=VALUE"
    return f"{key} is not given: it must be {words(node.type)}; give {give}"


def _unknown(schema: type[Section], node: Node, path: Sequence[object], part: object, above: Mapping) -> str:
    name = dotted((*path, part))
    known, target = node.names(above)
    siblings = [dotted((*path, other)) for other in known]
    near = alike(name, siblings, 1) or alike(name, [*siblings, *every_key(schema)])
    what = f"{shown(name)}={shown(above[part])}: " + (f"{target} {NO_ARGUMENT}" if target else NO_KEY)
    inside, name = above[part], shown(name)
    if not path and isinstance(inside, Mapping) and inside and set(map(str, inside)) <= set(names_of(schema)):
        return (
            f"{name}.{next(iter(inside))}: there is no section {name}; if a file of conf/{name}/ gives it, "
            "the file's first line must be `# @package _global_`"
        )
    if not path and part in TOP_GROUPS:
        return (
            f"{name}={shown(inside)}: there is no section {name}; a file of conf/{name}/ must hold keys with "
            "values (trainer: {batch: 8}, say) below a first line `# @package _global_`"
        )
    for mark in filter(None, map(picked, node.sections)):
        if owners := mark.owners(part):
            if mark.of_choice:
                choice = " or ".join(f"{dotted(path)}={owner}" for owner in owners)
                return f"{what} here, but there is with {choice}; choose that, or leave {name} out"
            return f"{what}, but {listed(owners)} does; choose that, or leave {name} out"
    if isinstance(part, str) and "." in part and name in every_key(schema):
        *sections, last = name.split(".")
        whole = f"{last}: {shown(inside)}"
        for section in reversed(sections):
            whole = f"{section}: {{{whole}}}"
        return f"{what}; in a file, sections stand in each other: {whole}"
    if near:
        return f"{what}; did you mean {' or '.join(near)}?"
    return f"{what}; there are {listed(known) or 'none'} (python -m capo.cli.explain lists all keys)"


def dotted(path: Sequence[object]) -> str:
    """Write a path of keys as on the command line."""
    return ".".join(map(str, path))


def shown(value: object) -> str:
    """Format a value as on the command line, shortened where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = str(value)
    except (ValueError, RecursionError):  # Python writes no number of more than some thousand digits
        text = f"({type(value).__name__} too long to be written)"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."

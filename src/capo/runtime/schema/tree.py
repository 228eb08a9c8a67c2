"""Sections of a schema, and the places in them: which type stands at which key."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

LATER = "later"  # of a field: the code that needs a mandatory value says with more words that it is missing
GROUP = "group"  # of a field: its values come from a file of the group of that name


class Section(BaseModel):
    """Keys with their types. Unknown keys are refused, no value is converted, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def key(meaning: str, default: Any = ..., *, later: bool = False, group: str | None = None) -> Any:
    """Field of a section: its meaning, and the default of a key that may be left out.

    Args:
        meaning: what the key sets, for messages, `capo.cli.explain` and docs/configuration.md.
        default: value that counts where the key is absent; without one the key must be there.
        later: whether the code that needs the key reports `???`, with more words than there are here.
        group: the group whose files give the value.
    """
    return Field(default, description=meaning, json_schema_extra={LATER: later, GROUP: group})


class Picked:
    """Mark of a value whose schema depends on the value itself: `Annotated[Any, Picked()]`."""

    said: str  # what must stand there
    registered: Mapping[str, type[Section]]  # what may be picked -> its schema; a class may leave it out
    of_choice = False  # whether that are the choices of a group, not targets
    text: Any = None  # the type of a value that is no mapping, if one may stand there

    def pick(self, value: Mapping[str, Any]) -> type[Section] | None:
        """Schema of a mapping; None: it is not known here, and its keys are free."""
        raise NotImplementedError

    def owners(self, name: object) -> list[str]:
        """Names of what could be picked and has a key of this name."""
        known = getattr(self, "registered", {})
        return [owner for owner, section in known.items() if field_of(section, name) is not None]

    def keys(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of the mapping that the schema describes."""
        return dict(value)

    def also(self, value: Mapping[str, Any]) -> None:
        """Raise ValidationError or PydanticCustomError for a mapping that may not stand there."""

    def validated(self, value: Any) -> Any:
        """Return the value; raise ValidationError or PydanticCustomError where it may not stand there."""
        if not isinstance(value, Mapping):
            if self.text is None:
                raise PydanticCustomError("picked", "no mapping")
            return adapter(self.text).validate_python(value, strict=True)
        self.also(value)
        if (schema := self.pick(value)) is not None:
            schema.model_validate(self.keys(value))
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validated)


@functools.lru_cache(maxsize=512)
def adapter(annotation: Any) -> TypeAdapter:
    """Adapter of a plain type with this package's strictness."""
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


@dataclass(frozen=True)
class Node:
    """A place in a schema: its type, the section and name that hold it, and its picked target, if any."""

    type: Any
    owner: type[Section] | None = None
    name: str = ""
    target: str | None = None

    @property
    def extra(self) -> Mapping[str, Any]:
        """Marks of the field (`key`)."""
        info = self.owner and self.owner.model_fields.get(self.name)
        found = info.json_schema_extra if info else None
        return found if isinstance(found, Mapping) else {}

    @property
    def sections(self) -> list[Any]:
        """Types of the node that hold further keys: sections, mappings by name, `Picked`."""
        return [kind for kind in parts(self.type) if holds_keys(kind)]

    def child(self, name: object, value: object) -> Node | None:
        """Return the node below, for the actual value of this one; None if nothing is known of that key."""
        for kind in self.sections:
            mark = picked(kind)
            section = kind
            target = None
            if mark is not None:
                section = mark.pick(value) if isinstance(value, Mapping) else None
                target = str(value.get("_target_")) if isinstance(value, Mapping) else None
            if section is not None and is_section(section):
                if (found := field_of(section, name)) is not None:
                    return Node(hints(section)[found], section, found, target)
            elif get_origin(kind) is dict:
                return Node(get_args(kind)[1])
        return None

    def names(self, value: object) -> tuple[list[str], str | None]:
        """Known keys below the node, for its actual value, and the target that takes them."""
        for kind in self.sections:
            if is_section(kind):
                return list(names_of(kind)), None
            if (mark := picked(kind)) and isinstance(value, Mapping) and (section := mark.pick(value)):
                target = value.get("_target_")
                return list(names_of(section)), None if target is None else str(target)
        return [], None


def parts(kind: Any) -> list[Any]:
    """Members of a union, or the type itself; `Annotated` with a `Picked` stays whole."""
    if get_origin(kind) is Annotated and picked(kind) is None:
        kind = get_args(kind)[0]
    if not _is_union(kind):
        return [kind]
    return [part for member in get_args(kind) for part in parts(member)]


def _is_union(kind: Any) -> bool:
    return getattr(get_origin(kind), "__name__", "") in ("Union", "UnionType")


def is_section(kind: Any) -> bool:
    """Whether a type is a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def picked(kind: Any) -> Picked | None:
    """Return the `Picked` of an annotation, if it has one."""
    return next((mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Picked)), None)


def holds_keys(kind: Any) -> bool:
    """Whether a value of this type has keys that the schema knows."""
    return is_section(kind) or picked(kind) is not None or get_origin(kind) is dict


@functools.cache
def hints(section: type[Section]) -> dict[str, Any]:
    """Types of a section's fields as they are written."""
    return get_type_hints(section, include_extras=True)


@functools.cache
def names_of(section: type[Section]) -> dict[str, str]:
    """Keys of a section, as a user writes them -> the names of their fields."""
    return {info.alias or name: name for name, info in section.model_fields.items()}


def field_of(section: type[Section], name: object) -> str | None:
    """Name of the field that a key sets."""
    return names_of(section).get(name) if isinstance(name, str) else None


def walked(schema: type[Section], above: str = "") -> Iterator[tuple[str, Node]]:
    """Yield (dotted key, node) of every key; `NAME` stands for a name that the user chooses.

    Keys of a `Picked` follow once, whatever is picked.
    """
    for name, field in names_of(schema).items():
        node = Node(hints(schema)[field], schema, field)
        yield f"{above}{name}", node
        yield from _below(node, f"{above}{name}.")


def _below(node: Node, above: str) -> Iterator[tuple[str, Node]]:
    for kind in node.sections:
        if is_section(kind):
            yield from walked(kind, above)
        elif (mark := picked(kind)) is not None:
            seen: set[str] = set()
            for section in getattr(mark, "registered", {}).values():
                for name, inner in walked(section, above):
                    if name not in seen:
                        seen.add(name)
                        yield name, inner
        elif get_origin(kind) is dict:
            yield from _below(Node(get_args(kind)[1]), f"{above}NAME.")


@functools.cache
def every_key(schema: type[Section]) -> tuple[str, ...]:
    """All keys of a schema, as `walked` writes them."""
    return tuple(name for name, _ in walked(schema))


def leaves(node: object, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], object]]:
    """Yield (path, value) of each value of a configuration that holds no others."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from leaves(value, (*path, name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from leaves(value, (*path, number))
    else:
        yield path, node

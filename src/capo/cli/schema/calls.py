"""Arguments of a user's own target, compared with its signature, and faults that a function finds itself."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from capo.cli.marks import MARKS, TARGET
from capo.cli.schema.evaluating import BENCHMARKS
from capo.cli.schema.groups import IMPORTS, OBJECTIVES, PAIRS, PROMPTS
from capo.cli.schema.kinds import Text
from capo.cli.schema.trainer import BACKBONES
from capo.cli.targets import find, place_of, unusable
from capo.cli.yaml_files import value_at
from capo.errors import InputError, ParameterError, closest
from capo.runtime.schema import MISSING, fault, shown

# keys with one `_target_` -> targets whose arguments the schema holds
CALLED = {
    "objective": OBJECTIVES,
    "pairs": PAIRS,
    "prompts": PROMPTS,
    "import": IMPORTS,
    "model.backbone": BACKBONES,
    "benchmark.set": BENCHMARKS,
}
BOUND = ("objective", "pairs")  # functions that are called later, with arguments bound now


def call_faults(key: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) for arguments that the target at `key` does not have, lacks, or of another type."""
    node = value_at(values, key.split("."))
    if not isinstance(node, Mapping):
        return
    if key in BOUND and node.get("_partial_") is not True:
        told = f"={shown(node['_partial_'])}" if "_partial_" in node else " is not given"
        yield f"{key}._partial_", f"{key}._partial_{told}: must be true; give ++{key}._partial_=true"
        return
    target = node.get(TARGET)
    if isinstance(target, str) and target in CALLED[key]:
        return
    place = place_of(tuple(key.split(".")))
    assert place, key  # CALLED names places
    try:
        function = find(place, target)
        signature = inspect.signature(function)
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception as error:  # importing a user's module can raise anything
        yield f"{key}.{TARGET}", unusable(f"{key}.{TARGET}={shown(target)}", error)
        return
    arguments = {str(name): value for name, value in node.items() if name not in MARKS}
    found = dict(_argument_faults(key, str(target), signature, hints, arguments))
    yield from found.items()
    check = getattr(function, "check_options", None)  # of a model family
    if not found and check is not None:
        try:
            check(**arguments)
        except ParameterError as error:
            yield f"{key}.{error.parameter}", said_of(key, error)


def _argument_faults(
    key: str, target: str, signature: inspect.Signature, hints: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    for name, value in given.items():
        place = f"{key}.{name}"
        if name not in signature.parameters and not takes_any:
            near = closest(name, list(signature.parameters))
            yield (
                place,
                f"{place}={shown(value)}: {target} takes no such argument"
                + (f"; did you mean {key}.{near[0]}?" if near else ""),
            )
        elif (
            value != MISSING
            and (kind := _plain(hints.get(name))) is not None
            and (message := fault(kind, place, value))
        ):
            yield place, message
    for name, parameter in signature.parameters.items():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and name not in given
        ):
            yield (
                f"{key}.{name}",
                f"{key}.{name} is not given, but {target} needs it; give +{key}.{name}=VALUE",
            )


def _plain(hint: Any) -> Any:
    """Type of a plain value that an annotation asks for; None if it does not restrict plain values."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = set(get_args(hint))
        if kinds <= {str, Path}:
            return Text
        rest = kinds - {type(None)}
        kind = _plain(rest.pop()) if len(rest) == 1 else None
        return kind if kind is None or type(None) not in kinds else kind | None
    return {int: int, float: float, bool: bool, str: Text}.get(hint)


@contextmanager
def under(group: str) -> Iterator[None]:
    """What is refused of a parameter is said of its key under `group`: of `objective.beta` for `beta`."""
    try:
        yield
    except ParameterError as error:
        raise InputError(said_of(group, error)) from error


def said_of(group: str, error: ParameterError) -> str:
    """Message of a refused parameter under its key."""
    return f"{group}.{error.parameter}={shown(error.value)}: {error.must}"

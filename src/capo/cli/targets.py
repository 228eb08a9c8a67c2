"""Which code a configuration may call, and where.

A `_target_` may stand at the places of PLACES alone, and each place knows what this package registers for it:
members of a package that have the place's form (a decorated objective, a subclass of `Family`), so that a new
one needs no entry here, or a list of names where nobody adds any.

The command line, with the conf/ folders that it composes, is the user's own: at an open place it may name
other code too. The config.yaml of a run may come from anywhere. It may call registered names, and exactly
those in `trust=[...]`; nothing below them, and in no other way than this package's own conf/ does.

Libraries are imported where a target is looked up: whether it stands at the right place is known without
them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capo.cli.marks import MARKS
from capo.runtime.schema import dotted, shown

DEEPEST = 20  # dots of a name; importing thousands of parts would end in a RecursionError
Path = tuple[object, ...]  # keys and list indices from the root


@dataclass(frozen=True)
class Place:
    """A key at which a configuration may call something.

    Attributes:
        key: the key; `*` stands for any name.
        homes: packages and modules whose members are registered if they have the form.
        has_form: whether a member, of the module with this name, has the form that belongs here.
        names: what is registered by name.
        marks: what may stand beside `_target_` in a run's config: key -> values.
        open: whether the command line may name other code than what is registered.
    """

    key: str
    homes: tuple[str, ...] = ()
    has_form: Callable[[Any, str], bool] = lambda found, module: False
    names: tuple[str, ...] = ()
    marks: Mapping[str, Sequence[object]] = field(default_factory=dict)
    open: bool = True

    @property
    def pattern(self) -> tuple[str, ...]:
        """Parts of the key, of which `*` stands for any name."""
        return tuple(self.key.split("."))

    def registered(self, name: object) -> Any | None:
        """Return what is registered under exactly this name, else None; imports no other code."""
        module, _, member = str(name).rpartition(".")
        if str(name).count(".") > DEEPEST:
            return None
        if name in self.names:
            return getattr(importlib.import_module(module), member)
        if any(part.startswith("_") for part in str(name).split(".")):
            return None
        if not any(module == home or module.startswith(f"{home}.") for home in self.homes):
            return None
        try:
            found = getattr(importlib.import_module(module), member, None)
        except ModuleNotFoundError as error:
            if error.name == module:
                return None
            raise
        return found if self.has_form(found, module) else None


def _objective(found: Any, module: str) -> bool:
    return inspect.isfunction(found) and hasattr(found, "requirements") and _of(found, module)


def _strategy(found: Any, module: str) -> bool:
    from capo.pairs import PairSets

    return _returns(PairSets, found, module)


def _prompt_sets(found: Any, module: str) -> bool:
    splits = ["train", "validation", "test"]
    return (
        inspect.isfunction(found)
        and list(inspect.signature(found).parameters)[:3] == splits
        and _of(found, module)
    )


def _benchmark(found: Any, module: str) -> bool:
    from capo.evaluation.benchmarks import Benchmark

    return _returns(Benchmark, found, module)


def _family(found: Any, module: str) -> bool:
    from capo.backbones import Family

    return (
        inspect.isclass(found)
        and issubclass(found, Family)
        and not inspect.isabstract(found)
        and _of(found, module)
    )


def _scorer(found: Any, module: str) -> bool:
    from capo.rewards.lookup import is_scorer

    return is_scorer(found, module)


def _returns(kind: type, found: Any, module: str) -> bool:
    """Whether `found` is a function of `module` that returns a `kind`, by its annotation."""
    return (
        inspect.isfunction(found)
        and inspect.signature(found).return_annotation in (kind, kind.__name__)
        and _of(found, module)
    )


def _of(found: Any, module: str) -> bool:
    """Whether `module` defines `found`, or is the package that exports it."""
    return found.__module__ == module or found.__module__.startswith(f"{module}.")


_FUNCTION: Mapping[str, Sequence[object]] = {"_partial_": (True,)}
REWARDS = ("rewards", "evaluation.rewards", "evaluation.oracle", "validation.held_out", "benchmark.rewards")
PLACES = (
    Place("objective", ("capo.objectives",), _objective, marks=_FUNCTION),
    Place("pairs", ("capo.pairs",), _strategy, marks=_FUNCTION),
    Place(
        "prompts", ("capo.data.prompts", "capo.shapes.prompts"), _prompt_sets, marks={"_convert_": ("all",)}
    ),
    Place("model.backbone", ("capo.backbones",), _family),
    Place("benchmark.set", ("capo.evaluation.benchmarks", "capo.shapes.benchmark"), _benchmark),
    Place(
        "model.known_images",
        names=("capo.preflight.model_check.photograph", "capo.shapes.prompts.known_scenes"),
    ),
    *(
        Place(
            f"{place}.*.scorer",
            ("capo.rewards", "capo.shapes.rewards", "capo.shapes.oracle"),
            _scorer,
            marks={"_partial_": (True, False)},
        )
        for place in REWARDS
    ),
    Place(
        "logger.*",
        names=tuple(f"capo.training.loggers.{kind}_logger" for kind in ("csv", "tensorboard", "wandb")),
    ),
    Place(
        "import",
        names=tuple(f"capo.data.importing.{kind}" for kind in ("pickapic", "rankings", "folder")),
        open=False,
    ),
)


def place_of(path: Path) -> Place | None:
    """Return the place with this path of keys; None if nothing is called there."""
    for place in PLACES:
        if len(path) == len(place.pattern) and all(
            wanted in ("*", name) for wanted, name in zip(place.pattern, path, strict=True)
        ):
            return place
    return None


def unusable(target: str, error: BaseException) -> str:
    """Message for a `target`, as `key=name`, that cannot be imported or is not there."""
    remedy = "give module.function"
    if isinstance(error, ModuleNotFoundError):
        remedy += f"; a module of your own is found if its folder is in PYTHONPATH, and {error.name} is not"
    return f"{target}: cannot be used ({error}); {remedy}"


def find(place: Place, name: object) -> Any:
    """Return the object that a target of the command line names.

    Raises ImportError if there is none, if it is not one that belongs here, and if its name leads through
    what a module has imported.
    """
    from capo.rewards.lookup import locate

    if (found := place.registered(name)) is not None:
        return found
    if not place.open:
        raise ImportError(f"{place.key} takes {', '.join(place.names)}")
    found = locate(str(name))
    if str(name).startswith("capo.") and not (
        place.has_form(found, found.__module__) and _of(found, str(name).rpartition(".")[0])
    ):
        raise ImportError(f"it is nothing of this package that {place.key} takes")
    return found


def calls(values: Mapping[str, Any]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield (path, node) of each node that says what is called, or how."""

    def walk(node: object, path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        if isinstance(node, Mapping):
            if any(mark in node for mark in MARKS):
                yield path, node
            for name, value in node.items():
                yield from walk(value, (*path, name))
        elif isinstance(node, list):
            for number, value in enumerate(node):
                yield from walk(value, (*path, number))

    yield from walk(values, ())


def misplaced(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) of each target of the command line's configuration where nothing is called.

    Below a place, as an argument of one's own code, targets may stand.
    """
    for path, node in calls(values):
        if not any(place_of(path[:length]) for length in range(1, len(path) + 1)):
            key = f"{dotted(path)}.{next(mark for mark in MARKS if mark in node)}"
            places = ", ".join(place.key for place in PLACES)
            value = shown(node[key.rpartition(".")[2]])
            yield key, f"{key}={value}: nothing is called there; a _target_ may stand at {places}"

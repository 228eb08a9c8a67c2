"""Types that several sections of the configuration share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from capo.cli.marks import MARKS, TARGET
from capo.runtime import limits
from capo.runtime.names import MUST, is_name
from capo.runtime.schema import Picked, Said, Section


def _rising(ends: list[float]) -> list[float]:
    if ends[0] > ends[1]:
        raise ValueError("the first is above the second")
    return ends


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
TwoOrMore = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 2)]  # the zero line's seed is the next one
Images = Annotated[int, Field(ge=1, le=limits.IMAGES)]  # of a prompt
SeveralImages = Annotated[int, Field(ge=2, le=limits.IMAGES)]  # likewise, where they are compared
Scenes = Annotated[int, Field(ge=1, le=limits.SCENES)]
Times = Annotated[int, Field(ge=1, le=limits.TIMES)]
Rate = Annotated[float, Field(gt=0, le=limits.RATE)]
Seconds = Annotated[float, Field(gt=0, le=limits.SECONDS)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
# the folder of a sweep's job is a number, which the command line reads as one
Folder = Annotated[
    Text | int, Said("a folder, written with a / where its name reads as something else (run=./1e3)")
]
Run = Annotated[
    Text | int,
    Said(
        "one folder (runs=[A,B] compares several), written with a / where its name reads as something else "
        "(run=./1e3)"
    ),
]
Folders = Annotated[
    Text | int | Annotated[list[Text | int], Field(min_length=1)],
    Said(
        "a folder or a list of folders, written with a / where a name reads as something else (runs=[./1e3])"
    ),
]
Files = Annotated[
    Text | int | Annotated[list[Text | int], Field(min_length=1)],
    Said("a file or a list of files, written with a / where a name reads as something else (results=./1)"),
]
Names = Annotated[list[Text], Said("a list of names")]
Range = Annotated[
    list[float],
    Field(min_length=2, max_length=2),
    AfterValidator(_rising),
    Said("[lowest, highest], of which the first is not the larger one"),
]
Numbers = Annotated[list[float], Said("a list of finite numbers, or null")]

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
DType = Literal["float32", "float16", "bfloat16"]
Draw = Literal[
    "uniform", "logsnr_normal", "logsnr_normal_late", "logsnr_uniform", "logit_normal"
]  # of UNets and of flows


def _named(value: str) -> str:
    if not is_name(value):
        raise ValueError(MUST)
    return value


Name = Annotated[str, AfterValidator(_named), Said(MUST.removeprefix("must be "))]


class Called(Picked):
    """Mark of a node that says what is called; the schema of its arguments is that of its `_target_`.

    Args:
        registered: targets of this package -> their arguments. A user's own target has the arguments of its
            signature (`capo.cli.schema.calls`).
        partial: whether the target is a function whose arguments are bound for later calls.
    """

    said = "a mapping that names what is called, {_target_: module.function, ...}"

    def __init__(self, registered: Mapping[str, type[Section]] | None = None, partial: bool = False):
        self.registered, self.partial = dict(registered or {}), partial

    def pick(self, value: Mapping[str, Any]) -> type[Section] | None:
        target = value.get(TARGET)
        return self.registered.get(target) if isinstance(target, str) else None

    def keys(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {name: inner for name, inner in value.items() if name not in MARKS or name == "_args_"}

    def also(self, value: Mapping[str, Any]) -> None:
        if TARGET not in value:
            raise PydanticCustomError("picked", "names no target")


class Argument(Picked):
    """Mark of a value that is either a section of its own, or of a plain type."""

    def __init__(self, section: type[Section], text: Any, said: str):
        self.section, self.text, self.said = section, text, said
        self.registered = {"": section}

    def pick(self, value: Mapping[str, Any]) -> type[Section]:
        return self.section

"""What a benchmark is, all of it data: prompts, images of each, and the files that its scorer reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from torch import Tensor

from capo.data.prompts import Prompt
from capo.errors import InputError

NAME_BYTES = 255  # of a file's name, in most file systems
ENDINGS = (".png", ".jpg", ".jpeg")
OVERALL = "overall"  # name of the figure over all prompts or groups


@dataclass(frozen=True)
class Picture:
    """An image file of the tree.

    Attributes:
        path: its place in the tree, with `/`; the ending decides the format.
        prompt: number of its prompt.
        images: numbers of the images of that prompt that it shows; several stand in rows of two.
    """

    path: str
    prompt: int
    images: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Official:
    """The official scorer, which runs outside this package.

    Attributes:
        source: where it is published.
        command: shell commands, with `{tree}` for the images of one model, `{folder}` and `{row}` for its
            folder and its name there, `{results}` for the folder of results, and `{width}` for an image's.
        remarks: what to know beside the commands.
        read: reads what it wrote, `(place, benchmark) -> {measure: (P,)}` with a value for each prompt;
            None: it only prints.
    """

    source: str
    command: str
    remarks: Sequence[str] = ()
    read: Callable[[Path, Benchmark], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A set of prompts, what is drawn for them, and where the images go.

    Attributes:
        name: name of the benchmark and of its pools.
        prompts: the official list, P prompts in its order; equal ones share their images.
        images: images of each prompt, K.
        pictures: the image files of the tree.
        texts: its other files, path -> content.
        groups: name -> numbers of the prompts that are averaged together; groups may overlap.
        overall: what the overall figure averages: "prompts" that are in any group, "groups", or None if the
            benchmark has no such figure.
        square: whether the scorer takes square images only.
        official: the official scorer; None if there is none.
        factors: measure -> what the official figure multiplies the reward's raw score by.
        notes: measure -> what its figures are, and with what they cannot be compared.
        measured: measure -> the only groups of which it is a figure; the others are figures of all.
        chunk: number of prompts in a row over whose means the official figure states the spread; None: none.

    Raises:
        InputError: the list is empty, a prompt has no text, or a file's name is too long or stands twice.
    """

    name: str
    prompts: Sequence[Prompt]
    images: int
    pictures: Sequence[Picture]
    texts: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    overall: Literal["prompts", "groups"] | None = "prompts"
    square: bool = False
    official: Official | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError(f"benchmark {self.name}: its list holds no prompt; give the official one")
        for number, prompt in enumerate(self.prompts):
            if not prompt.text:
                raise InputError(
                    f"benchmark {self.name}: prompt {number} has no text; give the official list"
                )
        seen = set()
        for path, number in [
            *((picture.path, picture.prompt) for picture in self.pictures),
            *((path, None) for path in self.texts),
        ]:
            place = "" if number is None else f' of prompt {number} ("{self.prompts[number].text[:80]}")'
            _check_path(self.name, path, place)
            if path in seen:
                raise InputError(
                    f"benchmark {self.name}: file '{path}'{place} stands there twice; give each its own name"
                )
            seen.add(path)

    @cached_property
    def drawn(self) -> list[Prompt]:
        """The prompts without repetitions."""
        return list({prompt.id: prompt for prompt in self.prompts}.values())

    @cached_property
    def places(self) -> list[int]:
        """Place in `drawn` of each prompt of the list."""
        place = {prompt.id: number for number, prompt in enumerate(self.drawn)}
        return [place[prompt.id] for prompt in self.prompts]

    @property
    def parts(self) -> dict[str, Sequence[int]]:
        """Name of each figure -> numbers of the prompts that it counts, the overall one first."""
        if self.overall is None:
            return dict(self.groups)
        held = sorted({number for numbers in self.groups.values() for number in numbers})
        return {OVERALL: held or range(len(self.prompts)), **self.groups}

    def parts_of(self, measure: str) -> dict[str, Sequence[int]]:
        """Those of `parts` of which a measure is a figure; InputError if none of them is drawn."""
        names = self.measured.get(measure)
        if names is None:
            return self.parts
        if found := {name: self.parts[name] for name in names if name in self.parts}:
            return found
        raise InputError(
            f"benchmark {self.name}: {measure} is a figure of {', '.join(names)} alone, and what is drawn is "
            f"{', '.join(self.parts)}; draw one of its groups, or leave {measure} out of benchmark.rewards"
        )

    @property
    def identity(self) -> str:
        """Hash of prompts and files, 64 hex digits: equal for equal trees of equal images."""
        files = [(picture.path, self.prompts[picture.prompt].id, picture.images) for picture in self.pictures]
        content = json.dumps([self.name, self.images, files, dict(self.texts)])
        return hashlib.sha256(content.encode()).hexdigest()

    def read_official(self, place: Path) -> dict[str, Tensor]:
        """Read what the official scorer wrote: measure -> (P,). InputError if it cannot be read."""
        if self.official is None or self.official.read is None:
            why = "has no official scorer" if self.official is None else "has a scorer that writes no figures"
            raise InputError(f"results={place}: benchmark {self.name} {why}; leave results out")
        return self.official.read(place, self)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; a file system may hold others."""
    try:
        return bool(name.encode()) or not name
    except UnicodeEncodeError:
        return False


def _check_path(benchmark: str, path: str, place: str) -> None:
    if not is_text(path):
        raise InputError(f"benchmark {benchmark}: the name of file {path!a}{place} is no UTF-8; rename it")
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or ".." in parts or path.startswith("/"):
        raise InputError(
            f"benchmark {benchmark}: file '{path}'{place} would stand outside its folder; name it within"
        )
    longest = max(len(part.encode()) for part in parts)
    if longest > NAME_BYTES:
        raise InputError(
            f"benchmark {benchmark}: the name of a file{place} would take {longest} bytes, a file system "
            f"has {NAME_BYTES}, and its scorer reads the prompt from there; shorten the prompt"
        )


def numbered(count: int, images: int) -> list[Picture]:
    """Pictures `00000_0.png`, by number of prompt and image, for benchmarks without an official scorer."""
    return [
        Picture(f"{number:05d}_{image}.png", number, (image,))
        for number in range(count)
        for image in range(images)
    ]

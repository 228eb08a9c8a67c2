"""Source of a split's prompts (a file, a folder, or files of a hub data set) and the filters of its rows."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from glob import glob
from pathlib import Path
from typing import Any

from capo.data.prompts.files import ENDINGS, READERS, ended
from capo.errors import InputError
from capo.runtime.hub import hub_file
from capo.runtime.limits import LETTERS

NSFW_NAME = re.compile("nsfw|unsafe", re.IGNORECASE)
PATTERN = re.compile(r"[*?\[]")
KINDS = (
    "a text file with one prompt per line, a folder of text files with one prompt each, CSV, TSV, JSONL or "
    "Parquet"
)


@dataclass(frozen=True)
class PromptFile:
    """File (or folder of text files) to read; `place` is its name in messages, `form` a key of READERS."""

    path: Path
    place: str
    form: str


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read from a file, by their purpose."""

    text: str
    category: str | None
    nsfw: tuple[str, ...]
    where: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """All names, without duplicates."""
        return list(
            dict.fromkeys([self.text, *([self.category] if self.category else []), *self.nsfw, *self.where])
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Source of one split's prompts. Raises InputError for an invalid value.

    Attributes:
        split: name of the split, for messages.
        name: name of the prompt set, for messages and the report.
        origin: what the set is and where to get it, for messages and the report.
        path: a local file, folder, or pattern with `*`; if given, the hub is not used.
        hub: id of a data set on the hub.
        file: name of a file in that data set, or several.
        revision: commit of that data set; None: main.
        format: a key of READERS; None: chosen by the file's extension.
        column: column of the prompts; None: the column called prompt, in upper or lower case.
        category: column of the categories used in reports.
        nsfw: threshold of the NSFW scores. A prompt is left out if a row of it has an NSFW score of at least
            this, a true NSFW boolean or a missing value. None: no filter.
        nsfw_columns: columns with NSFW scores or booleans; None: every column with nsfw or unsafe in its
            name.
        where: column -> value that a row must have; None: all rows count.
        max_length: largest number of characters of the normalized prompt; None: LETTERS.
        limit: largest number of prompts to keep; None: no limit.
        published_size: number of prompts in the published set, used by plans, which download no data set;
            None: not known.
    """

    split: str
    name: str = ""
    origin: str = KINDS
    path: str | None = None
    hub: str | None = None
    file: str | Sequence[str] | None = None
    revision: str | None = None
    format: str | None = None
    column: str | None = None
    category: str | None = None
    nsfw: float | None = 0.5
    nsfw_columns: Sequence[str] | None = None
    where: Mapping[str, object] | None = None
    max_length: int | None = 2000
    limit: int | None = None
    published_size: int | None = None

    def __post_init__(self):
        for key, (words, holds) in RULES.items():
            if not holds(value := getattr(self, key)):
                raise InputError(f"prompts.{self.split}.{key}={value}: must be {words}")
        if self.path is None and (self.hub is None or self.file is None):
            place = f"prompts.{self.split}"
            raise InputError(
                f"{place}: neither a path nor a hub data set with a file in it; give {place}.path=FILE"
            )

    @property
    def title(self) -> str:
        """Name of the set in the report: `name`, or else the name of the file or data set."""
        return self.name or Path(self.path or str(self.hub)).name

    def files(self) -> list[PromptFile]:
        """Files to read, downloaded from the hub if necessary. Raises InputError if one is not available."""
        if self.path is not None:
            return self._local(f"prompts.{self.split}.path={self.path}")
        names = [self.file] if isinstance(self.file, str) else list(self.file or ())
        found = [
            (
                hub_file(str(self.hub), name, self.revision, f"prompts.{self.split}"),
                f"prompts.{self.split}: {self.hub}/{name}",
            )
            for name in names
        ]
        return [PromptFile(path, place, self._form(path, place)) for path, place in found]

    def _local(self, place: str) -> list[PromptFile]:
        path = Path(str(self.path)).expanduser()
        if path.is_dir():
            return self._in_folder(path, place)
        if path.exists() or not PATTERN.search(path.name):
            if not path.exists():
                raise InputError(f"{place}: no such file or folder; give the path of {self.origin}")
            return [PromptFile(path, place, self._form(path, place))]
        found = [Path(name) for name in sorted(glob(str(path)))]
        if not found:
            raise InputError(f"{place}: no file matches; give the path of {self.origin}")
        return [
            PromptFile(file, f"prompts.{self.split}.path={file}", self._form(file, place)) for file in found
        ]

    def _in_folder(self, folder: Path, place: str) -> list[PromptFile]:
        """The folder itself if it holds text files, else its files, which must have one format."""
        forms = {form for form in ENDINGS.values() if ended(folder, form)}
        form = self.format or ("folder" if forms <= {"text"} else forms.pop() if len(forms) == 1 else None)
        if form is None:
            found = ", ".join(sorted(forms))
            raise InputError(
                f"{place}: holds files of {len(forms)} formats ({found}); "
                f"name one: prompts.{self.split}.format=..."
            )
        if form == "folder":
            if not ended(folder, "text"):
                raise InputError(f"{place}: a folder without prompts; give the path of {self.origin}")
            return [PromptFile(folder, place, form)]
        endings = [ending for ending, ended in ENDINGS.items() if ended == form]
        files = ended(folder, form)
        if not files:
            raise InputError(
                f"{place}: no {' or '.join(endings)} in this folder; give the path of {self.origin}"
            )
        return [PromptFile(file, f"prompts.{self.split}.path={file}", form) for file in files]

    def _form(self, path: Path, place: str) -> str:
        form = self.format or ENDINGS.get(path.suffix.lower())
        if form is None:
            raise InputError(
                f"{place}: its extension tells no format; name it: prompts.{self.split}.format= one of "
                f"{', '.join(READERS)}"
            )
        if form == "folder":
            raise InputError(
                f"{place}: a file, but prompts.{self.split}.format=folder; give the folder, or another format"
            )
        return form

    def columns(self, names: Sequence[str], place: str) -> Columns:
        """Columns to read from a file with columns `names`; `place` names the file in messages.

        Raises InputError, which lists `names`, if a column is missing.
        """
        prompts = [name for name in dict.fromkeys(names) if name.lower() == "prompt"]
        if self.column is None and len(prompts) > 1:
            raise InputError(
                f"{place}: columns {' and '.join(prompts)} hold prompts; name one: "
                f"prompts.{self.split}.column={prompts[0]}"
            )
        text = self.column or next(iter(prompts), None)
        if text is None:
            raise InputError(
                f"{place}: no column is called prompt; name one: prompts.{self.split}.column= one of "
                f"{', '.join(names)}"
            )
        nsfw = (
            tuple(name for name in names if NSFW_NAME.search(name))
            if self.nsfw_columns is None
            else tuple(self.nsfw_columns)
        )
        wanted = Columns(text, self.category, nsfw if self.nsfw is not None else (), tuple(self.where or ()))
        keys = [
            ("column", [wanted.text]),
            ("category", [wanted.category]),
            ("nsfw_columns", wanted.nsfw),
            ("where", wanted.where),
        ]
        for key, asked in keys:
            for name in asked:
                if name is not None and name not in names:
                    raise InputError(
                        f"{place}: no column '{name}' (prompts.{self.split}.{key}); there are "
                        f"{', '.join(names)}"
                    )
        return wanted


def _optional(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or holds(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _are_names(value: object) -> bool:
    return _is_text(value) or (bool(value) and _are_texts(value))


def _are_conditions(value: object) -> bool:
    return isinstance(value, Mapping) and not any(
        isinstance(wanted, list | tuple | Mapping) for wanted in value.values()
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_positive(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(
        ["path", "hub", "revision", "column", "category"], ("text, or null", _optional(_is_text))
    ),
    "file": ("the name of a file in the data set, or a list of them, or null", _optional(_are_names)),
    "format": (f"one of {', '.join(READERS)}, or null", _optional(lambda value: value in tuple(READERS))),
    "nsfw": ("a finite number above 0, or null", _optional(_is_positive)),
    "nsfw_columns": ("a list of columns, or null", _optional(_are_texts)),
    "where": ("a mapping {column: value} with one value each, or null", _optional(_are_conditions)),
    "max_length": (
        f"a whole number from 1 to {LETTERS}, or null",
        _optional(lambda value: isinstance(value, int) and _is_count(value) and value <= LETTERS),
    ),
    "limit": ("a whole number of at least 1, or null", _optional(_is_count)),
    "published_size": ("a whole number of at least 1, or null", _optional(_is_count)),
}


def source_of(split: str, given: object) -> Source:
    """Make a source from its configuration: a mapping, or a string, which is a path.

    Raises InputError for an unknown key or an invalid value.
    """
    if isinstance(given, str | Path):
        given = {"path": str(given)}
    if not isinstance(given, Mapping):
        raise InputError(f"prompts.{split}={given}: must be the path of {KINDS}, or a mapping with a path")
    keys: dict[str, Any] = {**given}
    known = [found.name for found in fields(Source) if found.name != "split"]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"prompts.{split}.{key}: no such key; {hint}")
    return Source(split=split, **keys)


def missing_inputs(keys: Sequence[str], given: Mapping[str, object]) -> str:
    """Message on missing keys: what each one is, and how to give it.

    keys: full keys, such as `prompts.train.path`, that the configuration of prompts, `given`, lacks.
    """
    wanted: dict[str, list[str]] = {}
    for key in keys:
        around = given.get(key.split(".")[1])
        origin = around.get("origin") if isinstance(around, Mapping) else None
        wanted.setdefault(origin or "a UTF-8 text file with one prompt per line", []).append(key)
    return "\n  ".join(
        f"{', '.join(same)}: not given; {'each is ' if len(same) > 1 else ''}the path of {what}, "
        f"e.g. {same[0]}=FILE"
        for what, same in wanted.items()
    )

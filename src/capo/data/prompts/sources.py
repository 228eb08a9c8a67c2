"""Where a split's prompts come from, and which rows of it count: a file, a folder, or a file of a hub data set."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from glob import glob
from pathlib import Path

from capo.data.prompts.files import ENDINGS, READERS
from capo.errors import InputError
from capo.runtime.hub import hub_file

NSFW_NAME = re.compile("nsfw|unsafe", re.IGNORECASE)
PATTERN = re.compile(r"[*?\[]")
KINDS = "a text file with one prompt a line, a folder of text files with one prompt each, CSV, TSV, JSONL or Parquet"


@dataclass(frozen=True)
class PromptFile:
    """A file (or a folder of texts) to be read: `place` is how messages call it, `form` a key of READERS."""

    path: Path
    place: str
    form: str


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read, and what for."""

    text: str
    category: str | None
    nsfw: tuple[str, ...]
    where: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Each name once."""
        return list(
            dict.fromkeys([self.text, *([self.category] if self.category else []), *self.nsfw, *self.where])
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One split's prompts. Raises InputError for a value that cannot be used.

    split: whose prompts they are; in messages only.
    name, origin: what the set is called, and what it is and where to get it; in messages and the report only.
    path: a file, a folder, or a pattern with `*` on this machine. It comes before the hub's:
    hub, file, revision: id of a data set, name of a file in it (or several), its commit (null: main).
    format: one of READERS; null: by the file's ending.
    column: of the prompts; null: the one called prompt, in whatever case. category: of what reports go by.
    nsfw: a row whose NSFW score reaches it, whose NSFW switch is true or whose value is missing leaves its prompt out; null: none does.
    nsfw_columns: their names; null: every column with nsfw or unsafe in its name.
    where: column -> value that a row must have.
    max_length: characters of the normalized prompt; limit: prompts kept. null: any number.
    published_size: prompts that the published set holds, for plans, which read no set of the hub. null: not known.
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
    where: Mapping[str, object] = field(default_factory=dict)
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
        """What the report calls the set: its name, else its file's."""
        return self.name or Path(self.path or str(self.hub)).name

    def files(self) -> list[PromptFile]:
        """What has to be read, downloaded where it must be. Raises InputError where it is not to be had."""
        if self.path is not None:
            return self._local(f"prompts.{self.split}.path={self.path}")
        names = [self.file] if isinstance(self.file, str) else list(self.file or ())
        found = [
            (
                hub_file(str(self.hub), name, self.revision, self.split),
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
            raise InputError(f"{place}: no file has such a name; give the path of {self.origin}")
        return [
            PromptFile(file, f"prompts.{self.split}.path={file}", self._form(file, place)) for file in found
        ]

    def _in_folder(self, folder: Path, place: str) -> list[PromptFile]:
        """The folder itself where it holds texts, else its files of the one format that they have."""
        forms = {form for ending, form in ENDINGS.items() if any(folder.glob(f"*{ending}"))}
        form = self.format or ("folder" if forms <= {"text"} else forms.pop() if len(forms) == 1 else None)
        if form is None:
            found = ", ".join(sorted(forms))
            raise InputError(
                f"{place}: holds files of {len(forms)} formats ({found}); name one: prompts.{self.split}.format=..."
            )
        if form == "folder":
            if not any(folder.glob("*.txt")):
                raise InputError(f"{place}: a folder without prompts; give the path of {self.origin}")
            return [PromptFile(folder, place, form)]
        endings = [ending for ending, ended in ENDINGS.items() if ended == form]
        files = sorted(file for ending in endings for file in folder.glob(f"*{ending}"))
        if not files:
            raise InputError(
                f"{place}: no {' or '.join(endings)} in this folder; give the path of {self.origin}"
            )
        return [PromptFile(file, f"prompts.{self.split}.path={file}", form) for file in files]

    def _form(self, path: Path, place: str) -> str:
        form = self.format or ENDINGS.get(path.suffix.lower())
        if form is None:
            raise InputError(
                f"{place}: its ending names no format; name it: prompts.{self.split}.format= one of {', '.join(READERS)}"
            )
        if form == "folder":
            raise InputError(
                f"{place}: a file, but prompts.{self.split}.format=folder; give the folder, or another format"
            )
        return form

    def columns(self, names: Sequence[str], place: str) -> Columns:
        """Which of the columns `names` are read. Raises InputError, with the names there are, for one that is missing."""
        text = self.column or next((name for name in names if name.lower() == "prompt"), None)
        if text is None:
            raise InputError(
                f"{place}: no column is called prompt; name one: prompts.{self.split}.column= one of {', '.join(names)}"
            )
        nsfw = (
            tuple(name for name in names if NSFW_NAME.search(name))
            if self.nsfw_columns is None
            else tuple(self.nsfw_columns)
        )
        wanted = Columns(text, self.category, nsfw if self.nsfw is not None else (), tuple(self.where))
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
                        f"{place}: no column '{name}' (prompts.{self.split}.{key}); there are {', '.join(names)}"
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


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(
        ["path", "hub", "revision", "column", "category"], ("text, or null", _optional(_is_text))
    ),
    "file": ("the name of a file in the data set, or a list of them, or null", _optional(_are_names)),
    "format": (f"one of {', '.join(READERS)}, or null", _optional(lambda value: value in tuple(READERS))),
    "nsfw": (
        "a finite number above 0, or null",
        _optional(lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0),
    ),
    "nsfw_columns": ("a list of columns, or null", _optional(_are_texts)),
    "where": ("column: value", lambda value: isinstance(value, Mapping)),
    "max_length": ("a whole number of at least 1, or null", _optional(_is_count)),
    "limit": ("a whole number of at least 1, or null", _optional(_is_count)),
    "published_size": ("a whole number of at least 1, or null", _optional(_is_count)),
}


def source_of(split: str, given: object) -> Source:
    """The source that a configuration describes; a text alone is a path. Raises InputError for an unknown key."""
    if isinstance(given, str | Path):
        given = {"path": str(given)}
    if not isinstance(given, Mapping):
        raise InputError(f"prompts.{split}={given}: must be the path of {KINDS}, or a mapping with a path")
    known = [found.name for found in fields(Source) if found.name != "split"]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"prompts.{split}.{key}: no such key; {hint}")
    return Source(split=split, **given)


def missing_inputs(keys: Sequence[str], given: Mapping[str, object]) -> str:
    """What to say of `keys` (`prompts.train.path`) that the configuration `given` of prompts lacks: what each is, how to give it."""
    wanted: dict[str, list[str]] = {}
    for key in keys:
        around = given.get(key.split(".")[1])
        origin = around.get("origin") if isinstance(around, Mapping) else None
        wanted.setdefault(origin or "a UTF-8 text file with one prompt a line", []).append(key)
    return "\n  ".join(
        f"{', '.join(same)}: not given; {'each is ' if len(same) > 1 else ''}the path of {what}, e.g. {same[0]}=FILE"
        for what, same in wanted.items()
    )

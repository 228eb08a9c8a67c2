"""Pairs and votes of a study in one SQLite file: each vote is committed before it is confirmed."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capo.errors import DamagedFile, InputError
from capo.runtime.files import led_to, lies_in, named_twice, own_places, refuse_links, whole_file
from capo.runtime.reading import read_bytes
from capo.runtime.run_folder import STUDY

REMEDY = "restore it, or make the study in another hydra.run.dir"
PNG = b"\x89PNG\r\n\x1a\n"  # how every such file begins
FILE, IMAGES = "study.sqlite", "images"
SCHEMA = 1
FIRST, SECOND, TIE = "first", "second", "tie"  # sides of a pair, and choices of a rater
SIDES = (FIRST, SECOND)
TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pairs (
    name TEXT PRIMARY KEY, prompt_id TEXT NOT NULL, prompt TEXT NOT NULL, category TEXT NOT NULL,
    is_check INTEGER NOT NULL
);
CREATE TABLE votes (
    rater TEXT NOT NULL, pair TEXT NOT NULL REFERENCES pairs (name),
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie')),
    left_side TEXT NOT NULL CHECK (left_side IN ('first', 'second')),
    seconds REAL, source TEXT NOT NULL, voted_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')),
    PRIMARY KEY (rater, pair)
);
"""
LONGEST = 10**9  # seconds of a vote: thirty years
LAYOUT = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
PAIR = re.compile(r"[0-9a-f]{12}", re.ASCII)  # a pair's name (`turns.pair_name`)
VOTE = """
INSERT INTO votes (rater, pair, choice, left_side, seconds, source) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (rater, pair) DO UPDATE SET choice = excluded.choice, left_side = excluded.left_side,
    seconds = excluded.seconds, source = excluded.source, voted_at = excluded.voted_at
"""


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt; of a check, the first one is intact and the second one damaged."""

    name: str
    prompt_id: str
    prompt: str
    category: str
    check: bool


@dataclass(frozen=True)
class Vote:
    """A rater's choice; `left` is the side that stood on the left, `seconds` how long the pair was looked at.

    `source`: "page", or "mturk" of imported votes.
    """

    rater: str
    pair: str
    choice: str
    left: str
    seconds: float | None = None
    source: str = "page"


@dataclass(frozen=True)
class Facts:
    """What the pairs of a study are.

    Attributes:
        names: names of the first and the second side in tables.
        seed: seed of the drawn prompts, of orders and of sides.
        ties: whether a rater may call a pair a tie.
        first, second: fingerprints of the generators of the two sides' images.
        image_seed: seed of the images.
        pairs: names of the pairs, checks included.
        schema: version of the file.
    """

    names: tuple[str, str]
    seed: int
    ties: bool
    first: str
    second: str
    image_seed: int
    pairs: tuple[str, ...]
    schema: int = SCHEMA

    def differences(self, other: Facts) -> list[str]:
        """List `name: value -> value` of what differs; of the pairs, their number."""
        found = []
        for name, value in asdict(self).items():
            new = getattr(other, name)
            if value != new and name == "pairs":
                found.append(f"pairs: {len(value)} -> {len(new)}, other prompts or checks")
            elif value != new:
                found.append(f"{name}: {value} -> {new}")
        return found


class Study:
    """An open study; its methods may be called from any thread. Close it, or use it as a context."""

    def __init__(self, folder: str | Path):
        """Open the study in `folder`; InputError if there is none, or another schema, or a damaged file."""
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self._lock = threading.Lock()
        refuse_links(self.folder, [self.path])  # votes are written to it
        if not self.path.is_file():
            inner = self.folder / STUDY  # where that of a run lies
            remedy = (
                f"give {inner}" if (inner / FILE).is_file() else "python -m capo.cli.study run=DIR makes one"
            )
            raise InputError(f"{self.folder} holds no study (no {FILE}): {remedy}")
        try:
            self._connection = _connected(self.path)
            self.facts, self.pairs = self._read()
        except (sqlite3.DatabaseError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedFile(self.path, str(error), REMEDY) from error

    def _read(self) -> tuple[Facts, dict[str, Pair]]:
        """Read what the study is; a file that comes from elsewhere has what `create` writes, or is refused.

        Raises InputError for another schema, and ValueError, TypeError, KeyError or sqlite3.DatabaseError for
        what is no study.
        """
        values = {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM facts")}
        if values.get("schema") != SCHEMA:
            raise InputError(
                f"{self.path} has schema {values.get('schema')}, but this version reads {SCHEMA}; use "
                "the version that made it"
            )
        with closing(sqlite3.connect(":memory:")) as fresh:
            fresh.executescript(TABLES)
            if self._rows(LAYOUT) != fresh.execute(LAYOUT).fetchall():
                raise ValueError("its tables are not those of a study")
        if (found := self._rows("PRAGMA quick_check(1)")) != [("ok",)]:
            raise ValueError(found[0][0])
        if self._rows("PRAGMA foreign_key_check"):
            raise ValueError("a vote is of a pair that it does not have")
        if self._rows(
            "SELECT 1 FROM votes WHERE typeof(rater) != 'text' OR typeof(seconds) IN ('text', 'blob') "
            f"OR NOT coalesce(seconds, 0) BETWEEN 0 AND {LONGEST}"
        ):
            raise ValueError("a vote's rater is no text, or its seconds are no number of seconds")
        if self._rows(
            "SELECT 1 FROM pairs WHERE typeof(name) != 'text' OR typeof(prompt_id) != 'text' "
            "OR typeof(prompt) != 'text' OR typeof(category) != 'text' OR is_check NOT IN (0, 1)"
        ):
            raise ValueError("a pair's name, prompt or category is no text")
        facts = Facts(**{**values, "names": tuple(values["names"]), "pairs": tuple(values["pairs"])})
        for name, kind in {"seed": int, "ties": bool, "first": str, "second": str, "image_seed": int}.items():
            if type(getattr(facts, name)) is not kind:
                raise ValueError(f"{name} is {getattr(facts, name)!r}")
        if len(facts.names) != len(SIDES) or not all(isinstance(name, str) for name in facts.names):
            raise ValueError(f"names is {list(facts.names)}, not two names")
        for name in ("seed", "image_seed"):
            if not 0 <= getattr(facts, name) < 2**63:
                raise ValueError(f"{name} is {getattr(facts, name)}, not from 0 to 2^63 - 1")
        rows = {
            row[0]: row for row in self._rows("SELECT name, prompt_id, prompt, category, is_check FROM pairs")
        }
        if strange := [name for name in facts.pairs if not PAIR.fullmatch(str(name)) or name not in rows]:
            raise ValueError(f"pair {strange[0]!r} is none of a study")  # images are called by it
        if others := sorted(rows.keys() - set(facts.pairs)):
            raise ValueError(f"pair {others[0]!r} is not among the pairs that its facts name")
        return facts, {name: _pair(*rows[name]) for name in facts.pairs}

    @classmethod
    def create(cls, folder: str | Path, facts: Facts, pairs: Sequence[Pair]) -> Study:
        """Write a study without votes, whose images are in place, and open it."""
        path = Path(folder) / FILE
        with whole_file(path) as unfinished:
            connection = _connected(unfinished)
            with connection:
                connection.executescript(TABLES)
                values = [(name, json.dumps(value)) for name, value in asdict(facts).items()]
                connection.executemany("INSERT INTO facts VALUES (?, ?)", values)
                rows = [(pair.name, pair.prompt_id, pair.prompt, pair.category, pair.check) for pair in pairs]
                connection.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?, ?)", rows)
            connection.close()
        return cls(folder)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; votes are in it already."""
        with self._lock:
            self._connection.close()

    def image(self, pair: str, side: str) -> bytes:
        """Read an image's PNG file.

        Raises DamagedFile for one that is not there or no PNG, and for a link that leads out of the study:
        whoever made its folder has chosen where that leads, and the image is shown and sent on.
        """
        path = image_path(self.folder, pair, side)
        if not lies_in(led_to(path), own_places(self.folder)):
            raise DamagedFile(path, f"it is a link to {led_to(path)}, outside of the study", REMEDY)
        try:
            content = read_bytes(path, REMEDY)
        except FileNotFoundError as error:
            raise DamagedFile(path, "it is not there", REMEDY) from error
        if not content.startswith(PNG):
            raise DamagedFile(path, "it is no PNG", REMEDY)
        return content

    def vote(self, *votes: Vote) -> None:
        """Record votes in one transaction, on disk when this returns.

        A later vote of a rater on the same pair replaces the earlier one. Raises sqlite3.IntegrityError for a
        pair or choice that does not exist.
        """
        rows = [(v.rater, v.pair, v.choice, v.left, v.seconds, v.source) for v in votes]
        with self._lock, self._connection:
            self._connection.executemany(VOTE, rows)

    def votes(self) -> list[Vote]:
        """All votes, by rater and pair."""
        columns = "rater, pair, choice, left_side, seconds, source"
        return [Vote(*row) for row in self._rows(f"SELECT {columns} FROM votes ORDER BY rater, pair")]

    def voted(self, rater: str) -> set[str]:
        """Names of the pairs on which a rater has voted."""
        return {name for (name,) in self._rows("SELECT pair FROM votes WHERE rater = ?", rater)}

    def counts(self) -> Mapping[str, int]:
        """Number of votes by rater."""
        return dict(self._rows("SELECT rater, COUNT(*) FROM votes GROUP BY rater ORDER BY rater"))

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()


def _pair(name: str, prompt_id: str, prompt: str, category: str, is_check: int) -> Pair:
    return Pair(name, prompt_id, prompt, category, bool(is_check))


def image_path(folder: Path, pair: str, side: str) -> Path:
    """Where the image of one side of a pair stands in a study's folder."""
    return folder / IMAGES / f"{pair}-{side}.png"


def _connected(path: Path) -> sqlite3.Connection:
    """Connect so that a commit waits for the disk: a vote outlives the process and the power."""
    connection = sqlite3.connect(path, timeout=30, check_same_thread=False)
    connection.execute("PRAGMA synchronous = EXTRA")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def open_studies(folders: Sequence[str | Path]) -> Iterator[list[Study]]:
    """Yield the opened studies; InputError if one cannot be opened, or is named twice."""
    if twice := named_twice(map(Path, folders)):
        raise InputError(f"{twice[0]} is named twice, so it would count as two studies; name it once")
    studies: list[Study] = []
    try:
        for folder in folders:
            studies.append(Study(folder))
        yield studies
    finally:
        for study in studies:
            study.close()

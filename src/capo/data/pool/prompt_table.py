"""Prompt table of a pool: its prompts and their positions."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa

from capo.data.pool.layout import LATENTS, TEXT
from capo.data.pool.parquet import read_table, write_sealed
from capo.data.prompts import Prompt
from capo.data.prompts.identity import entry_id
from capo.errors import DamagedFile, InputError

SCHEMA = pa.schema(
    {"prompt_id": pa.string(), "prompt": pa.string(), "split": pa.string(), "position": pa.int64()}
)
REMEDY = "restore it, or remove the pool: generate.py makes it anew"


class PromptTable:
    """File prompts.parquet of a pool, which is read once and replaced when prompts are appended.

    Row n consists of the prompts with position // prompts_per_shard = n. Categories are not stored. Since a
    pool may have millions of prompts, only ids and positions become Python objects; texts stay in Arrow's
    memory until they are needed. Raises DamagedFile for a file that cannot be read or was changed, and for
    rows that are not prompts with their ids at positions that follow each other. A table that is gone while
    files of its prompts are there is refused too: a new one would give their places to other prompts.
    """

    def __init__(self, path: Path, prompts_per_shard: int):
        self.path = path
        self.prompts_per_shard = prompts_per_shard
        self._read()

    def _load(self) -> pa.Table:
        try:
            table, _, whole = read_table(self.path, SCHEMA, REMEDY)
        except FileNotFoundError as error:
            shards = (path for name in (TEXT, LATENTS) for path in (self.path.parent / name).glob("[0-9]*"))
            shard = next(shards, None)
            if shard and not self.path.exists():  # it is the first file that another process writes
                fault = f"it is not there, but files of its prompts are, such as {shard.name}"
                raise DamagedFile(self.path, fault, REMEDY) from error
            return SCHEMA.empty_table()
        if fault := _fault(table, self.prompts_per_shard, whole):
            raise DamagedFile(self.path, fault, REMEDY)
        return table

    def _read(self) -> None:
        table = self._load()
        self._texts = table["prompt"]
        self._splits: list[str] = table["split"].unique().to_pylist()
        self._ids: list[str] = table["prompt_id"].to_pylist()
        numbers = table["position"].to_numpy()  # ascending, in order of appending
        self._positions = dict(zip(self._ids, numbers.tolist(), strict=True))
        rows, counts = np.unique(numbers // self.prompts_per_shard, return_counts=True)
        ends = counts.cumsum()
        # row -> slice of the columns
        self._rows = {
            row: slice(start, end)
            for row, start, end in zip(rows.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        }
        self._digests: dict[int, str] = {}

    def append(self, prompts: Sequence[Prompt], split: str, lock: AbstractContextManager) -> None:
        """Append prompts that the table lacks, from a new row on; enters `lock` only if there are any."""
        if all(prompt.id in self._positions for prompt in prompts):
            return
        with lock:
            self._read()  # another process may have added some
            fresh = {prompt.id: prompt.text for prompt in prompts if prompt.id not in self._positions}
            first = (max(self._rows, default=-1) + 1) * self.prompts_per_shard
            if fresh:
                positions = range(first, first + len(fresh))
                self._write(list(fresh), list(fresh.values()), [split] * len(fresh), positions)
        self._read()

    def _write(self, *added: Sequence) -> None:
        table = pa.concat_tables([self._load(), pa.table([*added], schema=SCHEMA)])
        write_sealed(self.path, table)

    @property
    def prompts(self) -> list[tuple[Prompt, int]]:
        """Pairs (prompt, position) of all prompts; the list is built at every call."""
        columns = self._ids, self._texts.to_pylist(), self._positions.values()
        return [(Prompt(*pair), position) for *pair, position in zip(*columns, strict=True)]

    def require_split(self, split: str) -> None:
        """Raise DamagedFile if prompts of another split are in the table: it is that of another pool."""
        if others := sorted({*self._splits} - {split}):
            raise DamagedFile(self.path, f"it holds prompts of split {others[0]}, not of {split}", REMEDY)

    def holds(self, prompt: Prompt) -> bool:
        """Whether the table has the prompt."""
        return prompt.id in self._positions

    def positions(self, prompts: Iterable[Prompt] | None = None) -> list[int]:
        """Positions of `prompts` (default: all). Raises InputError for a prompt that is not in the pool."""
        if prompts is None:
            return list(self._positions.values())
        found = []
        for prompt in prompts:
            if (position := self._positions.get(prompt.id)) is None:
                raise InputError(f'pool {self.path.parent} lacks prompt "{prompt.text}": generate.py adds it')
            found.append(position)
        return found

    def rows(self, positions: Iterable[int] | None = None) -> list[int]:
        """Numbers of all rows, or of the rows that contain `positions`, ascending."""
        if positions is None:
            return sorted(self._rows)
        return sorted({position // self.prompts_per_shard for position in positions})

    def row(self, number: int) -> list[Prompt]:
        """Prompts of a row, in the order of their positions."""
        texts = self._texts[self._rows[number]].to_pylist()
        return [Prompt(*pair) for pair in zip(self.row_ids(number), texts, strict=True)]

    def row_ids(self, number: int) -> list[str]:
        """Ids of the prompts of a row, in the order of their positions."""
        return self._ids[self._rows[number]]

    def row_positions(self, number: int) -> range:
        """Positions of the prompts of a row."""
        first, places = number * self.prompts_per_shard, self._rows[number]
        return range(first, first + places.stop - places.start)

    def digest(self, number: int) -> str:
        """Hash of the prompt ids of a row, 16 hex digits, which the headers of its shards contain."""
        if number not in self._digests:  # needed for every file of the row
            self._digests[number] = hashlib.sha256(" ".join(self.row_ids(number)).encode()).hexdigest()[:16]
        return self._digests[number]


def _fault(table: pa.Table, prompts_per_shard: int, whole: bool) -> str | None:
    """What is wrong with the rows of a prompt table, or None.

    Of a table whose checksum has been compared (`whole`), the ids were computed when it was written; hashing
    a million texts takes seconds.
    """
    for name in SCHEMA.names:
        if empty := table[name].null_count:
            return f"{name} is empty in {empty} rows"
    positions = table["position"].to_numpy()
    before, later = positions[:-1], positions[1:]
    in_next_row = (before // prompts_per_shard + 1) * prompts_per_shard
    follows = np.concatenate([positions[:1] == 0, (later == before + 1) | (later == in_next_row)])
    if not follows.all():
        row = int(follows.argmin())
        return f"position is {positions[row]} in row {row}, which does not follow on the row before"
    return None if whole else _other_ids(table)


def _other_ids(table: pa.Table) -> str | None:
    """Which row of a prompt table has the id of another text, or None."""
    seen: Counter[str] = Counter()
    columns = table["prompt_id"].to_pylist(), table["prompt"].to_pylist()
    for row, (name, text) in enumerate(zip(*columns, strict=True)):
        if name != entry_id(text, seen[text]):
            return f'prompt_id is {name} in row {row}, which is not that of its prompt "{text}"'
        seen[text] += 1
    return None

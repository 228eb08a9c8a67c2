"""Which prompts a pool holds, and at which positions."""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from capo.errors import InputError
from capo.pool.files import write_file
from capo.prompts import Prompt

SCHEMA = pa.schema({"prompt_id": pa.string(), "prompt": pa.string(), "split": pa.string(),
                    "position": pa.int64()})


class PromptTable:
    """The file prompts.parquet of a pool: read once, replaced whole when prompts are appended.

    `prompts` lists (prompt, position); a row is the prompts with its number as position // prompts_per_shard.
    Categories are not kept. Raises InputError for a file that cannot be read.
    """

    def __init__(self, path: Path, prompts_per_shard: int):
        self.path = path
        self.prompts_per_shard = prompts_per_shard
        self._read()

    def _read(self) -> None:
        try:
            columns = pq.ParquetFile(self.path).read().to_pydict()
        except FileNotFoundError:
            columns = {name: [] for name in SCHEMA.names}
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path} cannot be read; restore it or remove the pool") from error
        self._columns = columns
        self.prompts = [(Prompt(*pair), position) for *pair, position in
                        zip(columns["prompt_id"], columns["prompt"], columns["position"], strict=True)]
        self._positions = {prompt.id: position for prompt, position in self.prompts}
        self._rows: dict[int, list[Prompt]] = {}
        for prompt, position in self.prompts:
            self._rows.setdefault(position // self.prompts_per_shard, []).append(prompt)

    def append(self, prompts: Sequence[Prompt], split: str, lock: AbstractContextManager) -> None:
        """Adds the prompts that are not there yet, beginning a new row; takes `lock` only if it must."""
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
        columns = [[*self._columns[name], *more] for name, more in zip(SCHEMA.names, added, strict=True)]
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=SCHEMA), buffer)
        write_file(self.path, memoryview(buffer.getvalue()))

    def positions(self, prompts: Iterable[Prompt]) -> list[int]:
        """Position of each prompt. Raises InputError for one that is not in the pool."""
        prompts = list(prompts)
        for prompt in prompts:
            if prompt.id not in self._positions:
                raise InputError(f'pool {self.path.parent} lacks prompt "{prompt.text}": generate.py adds it')
        return [self._positions[prompt.id] for prompt in prompts]

    def rows(self, positions: Iterable[int] | None = None) -> list[int]:
        """Numbers of all rows, or of those of `positions`, ascending."""
        if positions is None:
            return sorted(self._rows)
        return sorted({position // self.prompts_per_shard for position in positions})

    def row(self, number: int) -> list[Prompt]:
        """The prompts of a row, in the order of their positions."""
        return self._rows[number]

    def row_positions(self, number: int) -> range:
        """The positions of a row's prompts."""
        first = number * self.prompts_per_shard
        return range(first, first + len(self._rows[number]))

    def digest(self, number: int) -> str:
        """16 hex digits over the ids of a row: what a shard of it belongs to."""
        return hashlib.sha256(" ".join(prompt.id for prompt in self._rows[number]).encode()).hexdigest()[:16]

"""Which prompts a pool holds, and at which positions."""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capo.data.pool.files import write_file
from capo.data.prompts import Prompt
from capo.errors import InputError

SCHEMA = pa.schema(
    {"prompt_id": pa.string(), "prompt": pa.string(), "split": pa.string(), "position": pa.int64()}
)


class PromptTable:
    """The file prompts.parquet of a pool: read once, replaced whole when prompts are appended.

    A row is the prompts with its number as position // prompts_per_shard. Categories are not kept. Only ids
    and positions become Python objects, since a pool may have millions of prompts; texts stay in Arrow's
    memory until they are asked for. Raises InputError for a file that cannot be read.
    """

    def __init__(self, path: Path, prompts_per_shard: int):
        self.path = path
        self.prompts_per_shard = prompts_per_shard
        self._read()

    def _load(self) -> pa.Table:
        try:
            return pq.ParquetFile(self.path).read()
        except FileNotFoundError:
            return SCHEMA.empty_table()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path} cannot be read; restore it or remove the pool") from error

    def _read(self) -> None:
        table = self._load()
        self._texts = table["prompt"]
        self._ids: list[str] = table["prompt_id"].to_pylist()
        numbers = table["position"].to_numpy()  # ascending, as they were appended
        self._positions = dict(zip(self._ids, numbers.tolist(), strict=True))
        rows, counts = np.unique(numbers // self.prompts_per_shard, return_counts=True)
        ends = counts.cumsum()
        # row -> its places in the columns
        self._rows = {
            row: slice(start, end)
            for row, start, end in zip(rows.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        }
        self._digests: dict[int, str] = {}

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
        table = pa.concat_tables([self._load(), pa.table([*added], schema=SCHEMA)])
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        write_file(self.path, memoryview(buffer.getvalue()))

    @property
    def prompts(self) -> list[tuple[Prompt, int]]:
        """(prompt, position) of all prompts, made anew at every call."""
        columns = self._ids, self._texts.to_pylist(), self._positions.values()
        return [(Prompt(*pair), position) for *pair, position in zip(*columns, strict=True)]

    def positions(self, prompts: Iterable[Prompt] | None = None) -> list[int]:
        """Position of each prompt, or of all there are. Raises InputError for one that is not in the pool."""
        if prompts is None:
            return list(self._positions.values())
        found = []
        for prompt in prompts:
            if (position := self._positions.get(prompt.id)) is None:
                raise InputError(f'pool {self.path.parent} lacks prompt "{prompt.text}": generate.py adds it')
            found.append(position)
        return found

    def rows(self, positions: Iterable[int] | None = None) -> list[int]:
        """Numbers of all rows, or of those of `positions`, ascending."""
        if positions is None:
            return sorted(self._rows)
        return sorted({position // self.prompts_per_shard for position in positions})

    def row(self, number: int) -> list[Prompt]:
        """The prompts of a row, in the order of their positions."""
        texts = self._texts[self._rows[number]].to_pylist()
        return [Prompt(*pair) for pair in zip(self.row_ids(number), texts, strict=True)]

    def row_ids(self, number: int) -> list[str]:
        """Their ids."""
        return self._ids[self._rows[number]]

    def row_positions(self, number: int) -> range:
        """The positions of a row's prompts."""
        first, places = number * self.prompts_per_shard, self._rows[number]
        return range(first, first + places.stop - places.start)

    def digest(self, number: int) -> str:
        """16 hex digits over the ids of a row: what a shard of it belongs to."""
        if number not in self._digests:  # asked for with every file of the row
            self._digests[number] = hashlib.sha256(" ".join(self.row_ids(number)).encode()).hexdigest()[:16]
        return self._digests[number]

"""Tables on disk, read a few rows at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from capo.errors import DamagedFile, InputError, first_line
from capo.runtime.reading import open_ordinary, other_separator, parse_json

BATCH = 32  # rows in memory at a time: 64 MB for two images of 1 MB per row
KINDS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
REMEDY = "correct it, or get it again"
SHARED = "put tables and images in a folder that all machines see under one name, or import with engine=local"


class Table:
    """Table in one file, with the `names` of its columns, the `count` of its rows and its `size` in bytes.

    Parquet is read in batches of rows within its row groups, whatever their size. The other formats hold no
    images and are read at once. Raises InputError for a file that cannot be read in the format of its
    extension.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.suffix not in KINDS:
            raise InputError(
                f"{path}: unknown format of a table; its name must end in one of {', '.join(KINDS)}"
            )
        with self._readable():
            self.size = path.stat().st_size
            self.names, self.count = (
                self._parquet_shape() if path.suffix == ".parquet" else self._text_shape()
            )

    def __getstate__(self) -> dict[str, object]:
        """What another process needs: not the rows, which it reads itself."""
        own = {name: value for name, value in self.__dict__.items() if name != "_rows"}
        return {**own, "path": self.path.absolute()}

    def check_here(self) -> None:
        """Raise InputError unless this machine sees the file as the process did that made this object."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise InputError(
                f"this machine does not see {self.path} ({first_line(error)}): {SHARED}"
            ) from error
        if size != self.size:
            raise InputError(
                f"{self.path} has {size} bytes on this machine, {self.size} where the import began: {SHARED}"
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            open_ordinary(self.path, partial(DamagedFile, remedy=REMEDY)).close()
            yield
        except (InputError, MemoryError):
            raise
        except Exception as error:  # what pyarrow raises for damaged bytes has no base class of its own
            kind = self.path.suffix[1:]
            raise InputError(
                f"{self.path} cannot be read as {kind} ({first_line(error)}); {REMEDY}"
            ) from error

    def _parquet_shape(self) -> tuple[list[str], int]:
        with pq.ParquetFile(self.path) as file:
            return _single(file.schema_arrow.names), file.metadata.num_rows

    def _text_shape(self) -> tuple[list[str], int]:
        names: dict[str, None] = {}
        for row in self._rows:
            names.update(dict.fromkeys(row))
        return list(names), len(self._rows)

    @cached_property
    def _rows(self) -> list[dict]:
        text = self.path.read_text(encoding="utf-8-sig")
        if self.path.suffix in (".csv", ".tsv"):
            delimiter = "\t" if self.path.suffix == ".tsv" else ","
            read = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            names = _single(read.fieldnames or ())
            if mark := other_separator(names, delimiter):
                raise ValueError(f"its first line has {mark!r} between columns, not {delimiter!r}")
            rows = list(read)
            for number, row in enumerate(rows, start=1):
                if None in row or None in row.values():
                    which = "more" if None in row else "fewer"
                    raise ValueError(f"row {number} has {which} cells than there are columns")
            return rows
        rows = (
            parse_json(text)
            if self.path.suffix == ".json"
            else [parse_json(line) for line in text.split("\n") if line.strip()]
        )
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it must be a list of objects, one per row")
        return rows

    def named(self, row: int, column: str) -> str:
        """Name of a cell in messages; rows count from 1 there."""
        return f"{self.path} row {row + 1}: {column}"

    def require(self, columns: dict[str, str]) -> None:
        """Raise InputError if the table lacks a column; `columns` maps import options to column names."""
        for option, name in columns.items():
            if name not in self.names:
                raise InputError(
                    f"{self.path} has no column '{name}' (import.{option}); it has "
                    f"{', '.join(self.names) or 'none'}: name the right one with import.{option}=COLUMN"
                )
        named = dict[str, str]()
        for option, name in columns.items():
            if (other := named.setdefault(name, option)) != option:
                raise InputError(
                    f"import.{option}={name}: it is import.{other} too; name the column that holds it with "
                    f"import.{option}=COLUMN, of {', '.join(self.names)}"
                )

    def holds_paths(self, column: str) -> bool:
        """Whether a column holds paths of image files; otherwise it holds the bytes of the images."""
        if self.path.suffix != ".parquet":
            return True
        with pq.ParquetFile(self.path) as file:
            kind = file.schema_arrow.field(column).type
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, list[dict]]]:
        """Batches (number of the first row, rows) of `columns`, from the batch that contains row `start`."""
        if self.path.suffix != ".parquet":
            yield 0, self._rows
            return
        with self._readable(), pq.ParquetFile(self.path) as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows <= start:
                    first += rows
                    continue
                for batch in file.iter_batches(
                    BATCH, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    if first + len(batch) > start:
                        yield first, batch.to_pylist()
                    first += len(batch)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict]]:
        """Pairs (number, row) of all rows."""
        for first, rows in self.batches(columns):
            yield from enumerate(rows, start=first)


def _single(names: Sequence[str]) -> list[str]:
    """Names of columns; ValueError for one that several have."""
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise ValueError(f"several columns are called {twice[0]}")
    return list(names)


class RowCursor:
    """Access to single rows of a table; it keeps the last batch, so requests in ascending order are fast."""

    def __init__(self, table: Table, columns: Sequence[str]):
        self.table, self.columns = table, columns
        self._first, self._rows = 0, []
        self._batches: Iterator[tuple[int, list[dict]]] | None = None

    def row(self, number: int) -> dict:
        """Row `number`. Raises DamagedFile if these columns have no such row, though others may."""
        if self._batches is None or number < self._first:
            self._batches, self._first, self._rows = self.table.batches(self.columns, number), 0, []
        while number >= self._first + len(self._rows):
            try:
                self._first, self._rows = next(self._batches)
            except StopIteration:
                raise DamagedFile(
                    self.table.path, f"it has no row {number + 1} of {', '.join(self.columns)}", REMEDY
                ) from None
        return self._rows[number - self._first]

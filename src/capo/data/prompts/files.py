"""Readers of prompt files, one function per format; each yields batches of the columns that `choose` selects.

All readers have the signature `(file, place, choose)`. `place` is the name of the file in messages, such as
`prompts.train.path=FILE`. A reader raises InputError for a file that cannot be read in its format.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capo.data.prompts.text import decoded_lines, prompt_lines, readable, unreadable
from capo.errors import InputError, first_line
from capo.runtime.reading import open_ordinary, other_separator, parse_json

BATCH = 2**15  # rows held as Python objects at a time
Batch = dict[str, list]  # column -> its values, all of one length
Choose = Callable[
    [Sequence[str]], Sequence[str]
]  # names of all columns -> names of those to read; raises InputError if one is missing


def read_text(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """Text file with one prompt per line, column `prompt`."""
    return _columns(choose(["prompt"]), ((line,) for line in prompt_lines(file, place)))


def read_folder(folder: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """Folder of .txt files with one prompt each, sorted by name.

    Columns: `prompt`, the whole text of the file, and `name`, its file name without .txt.
    """
    names = choose(["prompt", "name"])
    files = ended(folder, "text")
    values = {
        "prompt": lambda file: "".join(decoded_lines(file, f"{place}/{file.name}")),
        "name": lambda file: file.stem,
    }
    return _columns(names, ([values[name](file) for name in names] for file in files))


def read_csv(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """Comma-separated values, quoted with double quotes where needed; the first line names the columns."""
    return _table(file, place, choose, delimiter=",")


def read_tsv(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """Tab-separated values without quoting, as in PartiPrompts: a quotation mark is an ordinary character."""
    return _table(file, place, choose, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_jsonl(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """JSON Lines: one object per line, whose keys are the columns; a missing key gives None.

    Blank lines are skipped.
    """
    lines = (
        (number, line) for number, line in enumerate(decoded_lines(file, place), start=1) if line.strip()
    )
    while chunk := list(islice(lines, BATCH)):
        records = [_record(line, f"{place}: line {number}") for number, line in chunk]
        names = list(dict.fromkeys(name for record in records for name in record))
        yield {name: [record.get(name) for record in records] for name in choose(names)}


def read_parquet(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """Parquet file, of which only the chosen columns are read, one batch at a time."""
    try:
        with readable(place), open_ordinary(file, unreadable(place)) as whole, pq.ParquetFile(whole) as table:
            names = single(choose(table.schema_arrow.names), table.schema_arrow.names, place)
            for batch in table.iter_batches(BATCH, columns=names):
                yield batch.to_pydict()
    except (InputError, MemoryError):
        raise
    except Exception as error:  # what pyarrow raises for damaged bytes has no base class of its own
        raise InputError(
            f"{place}: not a complete Parquet file ({first_line(error)}); get it again"
        ) from error


READERS = {
    "text": read_text,
    "folder": read_folder,
    "csv": read_csv,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}
ENDINGS = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}


def ended(folder: Path, form: str) -> list[Path]:
    """What has an ending of the format `form` in a folder, in upper or lower case, sorted by name."""
    return sorted(path for path in folder.iterdir() if ENDINGS.get(path.suffix.lower()) == form)


def single(chosen: Sequence[str], columns: Sequence[str], place: str) -> list[str]:
    """Columns to read; InputError for one whose name several columns have."""
    if twice := [name for name in chosen if list(columns).count(name) > 1]:
        raise InputError(f"{place}: several columns are called '{twice[0]}'; rename all but one of them")
    return list(chosen)


def row_count(file: Path, form: str) -> int | None:
    """Number of rows of a file if its metadata states it (Parquet), else None."""
    try:
        if form != "parquet":
            return None
        with open_ordinary(file, unreadable(str(file))) as whole:
            return pq.read_metadata(whole).num_rows
    except (InputError, OSError, pa.ArrowException):
        return None  # the reader of the file raises the error


def _table(file: Path, place: str, choose: Choose, **dialect: Any) -> Iterator[Batch]:
    rows = csv.reader(decoded_lines(file, place), strict=True, **dialect)
    try:
        header = next(rows, [])
        if not header:
            raise InputError(f"{place}: the first line is empty; it must name the columns")
        if mark := other_separator(header, dialect["delimiter"]):
            raise InputError(
                f"{place}: its first line has {mark!r} between columns, where {dialect['delimiter']!r} "
                "should stand; write it as CSV, with commas, or as TSV, with tabs"
            )
        names = single(choose(header), header, place)
        yield from _columns(names, _cells(rows, header, names, place))
    except csv.Error as error:
        raise InputError(
            f"{place}: line {rows.line_num} cannot be read ({error}); correct it, or write the table as JSON "
            "Lines"
        ) from error


def _cells(rows, header: list[str], names: Sequence[str], place: str) -> Iterator[list[str]]:
    """Cells of the columns `names` in each row of a `csv.reader`; empty rows are skipped."""
    places = [header.index(name) for name in names]
    for row in rows:
        if row and len(row) != len(header):  # an unquoted separator in a prompt would silently truncate it
            raise InputError(
                f"{place}: line {rows.line_num} has {len(row)} cells, but there are {len(header)} columns "
                f"({', '.join(header)}); correct it (in CSV, put double quotes around a cell that contains a "
                "comma; TSV has no quotes)"
            )
        if row:
            yield [row[index] for index in places]


def _record(line: str, place: str) -> dict:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise InputError(f"{place} {str(error).removeprefix('it ')}; write one object per line") from error
    if not isinstance(record, dict):
        raise InputError(
            f'{place} is not a JSON object; write one per line, such as {{"prompt": "a red circle"}}'
        )
    return record


def _columns(names: Sequence[str], rows: Iterable[Sequence]) -> Iterator[Batch]:
    rows = iter(rows)
    while chunk := list(islice(rows, BATCH)):
        yield {name: list(values) for name, values in zip(names, zip(*chunk, strict=True), strict=True)}

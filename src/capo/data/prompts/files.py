"""Files of prompts: one function a format, each giving batches of the columns that its caller chooses."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from capo.data.prompts.text import decoded_lines, readable
from capo.errors import InputError

BATCH = 2**15  # rows held as Python objects at a time
Batch = dict[str, list]  # column -> its values, all of one length
Choose = Callable[
    [Sequence[str]], Sequence[str]
]  # the columns there are -> those to read; InputError where one is missing


def read_text(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """One prompt a line, column `prompt`."""
    return _columns(choose(["prompt"]), ((line,) for line in decoded_lines(file, place)))


def read_folder(folder: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """One prompt a *.txt file, by name: columns `prompt` (all of the file's text) and `name` (the file's, without .txt)."""
    names = choose(["prompt", "name"])
    files = sorted(folder.glob("*.txt"))
    values = {
        "prompt": lambda file: "".join(decoded_lines(file, f"{place}/{file.name}")),
        "name": lambda file: file.stem,
    }
    return _columns(names, ([values[name](file) for name in names] for file in files))


def read_csv(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """Comma separated, in double quotes what needs them; the first line names the columns."""
    return _table(file, place, choose, delimiter=",")


def read_tsv(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """Tab separated without quoting, as PartiPrompts is: a quotation mark is a character like any other."""
    return _table(file, place, choose, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_jsonl(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """A JSON object a line; its keys are the columns, a key that a line lacks is None. Lines without text are passed over."""
    lines = (
        (number, line) for number, line in enumerate(decoded_lines(file, place), start=1) if line.strip()
    )
    while chunk := list(islice(lines, BATCH)):
        records = [_record(line, f"{place}: line {number}") for number, line in chunk]
        names = list(dict.fromkeys(name for record in records for name in record))
        yield {name: [record.get(name) for record in records] for name in choose(names)}


def read_parquet(file: Path, place: str, choose: Choose) -> Iterator[Batch]:
    """The chosen columns alone are read, a batch at a time."""
    try:
        with readable(place), pq.ParquetFile(file) as table:
            names = list(choose(table.schema_arrow.names))
            for batch in table.iter_batches(BATCH, columns=names):
                yield batch.to_pydict()
    except pa.ArrowException as error:
        raise InputError(
            f"{place}: no whole Parquet file ({str(error).splitlines()[0]}); get it again"
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


def row_count(file: Path, form: str) -> int | None:
    """Rows of a file where its format says so without being read; else None."""
    try:
        return pq.read_metadata(file).num_rows if form == "parquet" else None
    except (OSError, pa.ArrowException):
        return None  # whoever reads it says what is wrong


def _table(file: Path, place: str, choose: Choose, **dialect: object) -> Iterator[Batch]:
    rows = csv.reader(decoded_lines(file, place), **dialect)
    try:
        header = next(rows, [])
        if not header:
            raise InputError(f"{place}: empty in its first line, which must name the columns")
        names = choose(header)
        yield from _columns(names, _cells(rows, header, names, place))
    except csv.Error as error:
        raise InputError(
            f"{place}: line {rows.line_num} cannot be read ({error}); write it as CSV or TSV"
        ) from error


def _cells(rows, header: list[str], names: Sequence[str], place: str) -> Iterator[list[str]]:
    """The cells of `names` in each row of a `csv.reader`; rows without anything are passed over."""
    places = [header.index(name) for name in names]
    for row in rows:
        if row and len(row) != len(header):  # a comma or a tab within a prompt would cut it off in silence
            raise InputError(
                f"{place}: line {rows.line_num} has {len(row)} cells, but there are {len(header)} columns ({', '.join(header)}); "
                "correct it (in CSV, double quotes stand around what holds a comma; TSV has no quotes)"
            )
        if row:
            yield [row[index] for index in places]


def _record(line: str, place: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not JSON ({error}); write one object a line") from error
    if not isinstance(record, dict):
        raise InputError(f'{place} is no JSON object; write one a line, such as {{"prompt": "a red circle"}}')
    return record


def _columns(names: Sequence[str], rows: Iterable[Sequence]) -> Iterator[Batch]:
    rows = iter(rows)
    while chunk := list(islice(rows, BATCH)):
        yield {name: list(values) for name, values in zip(names, zip(*chunk), strict=True)}

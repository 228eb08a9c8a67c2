"""Read files that may be damaged or edited: each holds what its format says, or is a `DamagedFile`."""

import csv
import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from capo.errors import DamagedFile, InputError

Value = TypeVar("Value")
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half a character, in JSON; two of them make one
FOLDER_REMEDY = "get the model's folder again"  # for a file in a folder of diffusers or transformers


def open_ordinary(path: Path, fault: Callable[[Path, str], InputError]) -> BufferedReader:
    """Open an ordinary file to read its bytes.

    Raises `fault(path, reason)` for anything else (a folder, a pipe, which would be waited for, a circle of
    links) and for a file that the system does not let be read, and FileNotFoundError if there is none.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        raise fault(path, error.strerror or str(error)) from error
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise fault(path, "it is no ordinary file")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_bytes(path: str | Path, remedy: str) -> bytes:
    """Read a file whole; `remedy` ends the message of a DamagedFile. Errors as in `open_ordinary`."""
    try:
        with open_ordinary(Path(path), partial(DamagedFile, remedy=remedy)) as file:
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:  # of the disk
        raise DamagedFile(Path(path), error.strerror or str(error), remedy) from error


def read_text(path: str | Path, remedy: str) -> str:
    """Read a UTF-8 file whole; errors as in `read_bytes`, and DamagedFile for another encoding."""
    try:
        return read_bytes(path, remedy).decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(Path(path), f"it is no UTF-8 text from byte {error.start} on", remedy) from error


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds one object; errors as in `read_text`, and DamagedFile for anything else."""
    return _parsed(path, remedy, parse_object)


def read_any_json(path: str | Path, remedy: str) -> Any:
    """Read a JSON file that holds any value; errors as in `read_json`."""
    return _parsed(path, remedy, parse_writable)


def _parsed(path: str | Path, remedy: str, parse: Callable[[str], Value]) -> Value:
    text = read_text(path, remedy)
    try:
        return parse(text)
    except ValueError as error:
        raise DamagedFile(Path(path), str(error), remedy) from error


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError, which says what is wrong, for text that is not, or too deeply nested."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error


def parse_writable(text: str) -> Any:
    """Parse JSON whose texts are to be written again.

    Raises ValueError as `parse_json`, and for half a character (an escaped surrogate without its other half),
    which no file can hold.
    """
    found = parse_json(text)
    if HALF.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise ValueError(f"it holds half a character, \\u{half:04x}") from error
    return found


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; ValueError as in `parse_writable`, and for any other value."""
    found = parse_writable(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no names with values")
    return found


def other_separator(columns: Sequence[str], own: str) -> str | None:
    """What separates the names that a table's first line has, if it is not its `own` separator; else None."""
    return next((mark for mark in ";\t," if len(columns) == 1 and mark != own and mark in columns[0]), None)


def read_rows(path: str | Path, remedy: str) -> list[dict[str, str]]:
    """Read a CSV file whose first line names its columns: one mapping of all columns for each row.

    Errors as in `read_text`, and DamagedFile for rows of another length, columns without a name or with one
    name, and text that is no CSV.
    """
    path, text = Path(path), read_text(path, remedy)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise DamagedFile(path, f"it is not CSV: {error}", remedy) from error
    columns, *rows = rows or [[]]
    if len(set(columns)) != len(columns) or "" in columns:
        raise DamagedFile(path, f"its first line does not name the columns: {','.join(columns)!r}", remedy)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns):
            reason = f"row {number} has {len(row)} cells, but there are {len(columns)} columns"
            raise DamagedFile(path, reason, remedy)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def cell(path: Path, row: Mapping[str, str], column: str, kind: Callable[[str], Value], remedy: str) -> Value:
    """Value of a cell, as `kind` (int or float) reads it. Raises DamagedFile, which names the column."""
    try:
        value = kind(row[column])
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"it is {value}")
        return value
    except KeyError as error:
        raise DamagedFile(path, f"it has no column {column}", remedy) from error
    except ValueError as error:
        raise DamagedFile(path, f"{column} is {row[column]!r}, not a finite number", remedy) from error

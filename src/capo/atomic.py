"""Files that are there whole under their final name, or not at all."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from capo.errors import InputError

REMEDY = "make room there, or choose another output directory (hydra.run.dir)"


def write_whole(path: str | Path, *parts: str | bytes | memoryview, remedy: str = REMEDY) -> None:
    """Writes `parts` (text as UTF-8) under a temporary name beside `path`, syncs and renames.

    The temporary name is always the same, so what a process that died has left is overwritten; there must be
    one writer of `path` at a time. Makes the folder if need be. Raises InputError, with `remedy`, where the
    folder cannot be written or the disk is full; what stood there before then stays.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): {remedy}") from error
    finally:
        with suppress(OSError):  # it has been renamed, or its folder could not be made
            unfinished.unlink()


def write_table(path: str | Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """`rows` as CSV, as `write_whole` writes; a value that a row lacks is an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue())

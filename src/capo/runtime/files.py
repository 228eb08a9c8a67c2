"""Files that are there whole under their final name, or not at all."""

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place when the block ends without an exception.

    What stood there before is removed only after the new folder has been moved in; a block that raises leaves
    it as it was.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = workplace / "new"
        fresh.mkdir()  # mkdtemp's own folder is closed to everyone else, which a result should not be
        yield fresh
        _swap(fresh, folder, workplace / "old")
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _swap(fresh: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; synced and renamed at the end, removed where that is not reached."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): {REMEDY}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()

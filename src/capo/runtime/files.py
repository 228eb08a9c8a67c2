"""Atomic writes: a file or folder appears under its final name complete, or not at all."""

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


@contextmanager
def whole_file(path: str | Path, remedy: str = REMEDY) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; sync and rename it to `path` when the block succeeds.

    The temporary name is fixed, so a leftover of a killed process is overwritten; only one process may write
    `path` at a time. The folder is created if it is missing. If the block raises, the previous file is kept.
    Raises InputError, with `remedy`, if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): {remedy}") from error
    finally:
        with suppress(OSError):  # already renamed, or its folder could not be created
            unfinished.unlink()


def write_whole(path: str | Path, *parts: str | bytes | memoryview, remedy: str = REMEDY) -> None:
    """Write `parts` (text as UTF-8) to `path` atomically, as `whole_file` does."""
    with whole_file(path, remedy) as unfinished, unfinished.open("wb") as file:
        for part in parts:
            file.write(part.encode() if isinstance(part, str) else part)


def second_name(path: Path, other: Path) -> bool:
    """Give the file at `path` the name `other` too, in place of what was there, by a hard link.

    Returns whether the file system has such links; without them nothing changes.
    """
    unfinished = other.with_name(f".{other.name}.tmp")
    try:
        unfinished.unlink(missing_ok=True)
        os.link(path, unfinished)
        unfinished.replace(other)
    except OSError:
        return False
    finally:
        with suppress(OSError):  # still there if both names were one file's already
            unfinished.unlink()
    return True


def write_table(path: str | Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` to a CSV file atomically (`write_whole`); a missing value becomes an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue())


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it replaces `folder` when the block ends without an exception.

    The previous folder is removed only after the new one is in place; if the block raises, it stays.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = workplace / "new"
        fresh.mkdir()  # mkdtemp's own folder is readable by its owner alone; a result should not be
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

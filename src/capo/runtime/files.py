"""Atomic writes: a file or folder appears under its final name complete, or not at all."""

import csv
import ctypes
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from capo.errors import InputError
from capo.runtime.terminal import printable

ELSEWHERE = "choose another output directory (hydra.run.dir)"
REMEDY = f"make room there, or {ELSEWHERE}"
FORMULA = ("=", "+", "-", "@")
AT_CWD, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


@contextmanager
def whole_file(path: str | Path, remedy: str = REMEDY, unfinished: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; sync and rename it to `path` when the block succeeds.

    It is `unfinished`, on the same file system, or a fixed name beside `path`, so a leftover of a killed
    process is overwritten; only one process may write `path` at a time. The folder is created if it is
    missing. If the block raises, the previous file is kept.
    Raises InputError, with `remedy`, if the folder cannot be written or the disk is full, and for a device, a
    pipe or a folder at `path`, which would be replaced.
    """
    path = Path(path)
    check_ordinary(path)
    unfinished = unfinished or path.with_name(f".{path.name}.tmp")
    try:
        for folder in (path.parent, unfinished.parent):
            folder.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)  # a link, in a folder from elsewhere, would be followed
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): {remedy}") from error
    finally:
        with suppress(OSError):  # already renamed, or its folder could not be created
            unfinished.unlink()


def appending(path: Path) -> io.BufferedWriter:
    """Open a file to append bytes; OSError for a folder, and for a pipe, whose reader would be waited for."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))


def check_ordinary(path: Path, key: str = "", other: str = ", or give another name") -> None:
    """Raise InputError if something stands at `path`, the value of `key`, that is no ordinary file.

    `other` ends the message: what else can be done.
    """
    if path.exists() and not path.is_file():
        place = f"{key}={path}" if key else path
        raise InputError(f"{place} is no ordinary file, which alone is replaced: move it away{other}")


def write_whole(path: str | Path, *parts: str | bytes | memoryview, remedy: str = REMEDY) -> None:
    """Write `parts` (text as UTF-8) to `path` atomically, as `whole_file` does."""
    with whole_file(path, remedy) as unfinished, unfinished.open("wb") as file:
        for part in parts:
            file.write(part.encode() if isinstance(part, str) else part)


def write_json(path: str | Path, value: object, *, remedy: str = REMEDY, allow_nan: bool = True) -> None:
    """Write `value` as indented JSON to `path` atomically (`write_whole`).

    Raises ValueError for a number that is not finite, unless `allow_nan` is set.
    """
    write_whole(path, json.dumps(value, indent=2, allow_nan=allow_nan) + "\n", remedy=remedy)


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
    """Write `rows` to a CSV file atomically (`write_whole`); a missing value becomes an empty cell.

    Text that a spreadsheet or a terminal would obey is changed (`plain_cell`).
    """
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows({name: plain_cell(value) for name, value in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def plain_cell(value: object) -> object:
    """Return a cell as it is, but text that begins a formula, and is no number, after an apostrophe.

    Prompts and errors come from anywhere, and spreadsheets compute what begins with = + - or @. Control
    characters, which a terminal that shows the table would obey, are written out.
    """
    if not isinstance(value, str):
        return value
    value = printable(value)
    if not value.lstrip().startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


@contextmanager
def fresh_folder(folder: str | Path, *marks: str) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it replaces `folder` when the block ends without an exception.

    The previous folder is removed only after the new one is in place; if the block raises, it stays. Wherever
    the process is killed, one of the two stands there, or is put back by `put_back`. `marks` are names, or
    patterns, of files by which a folder that this package wrote is known. Raises InputError if there is
    anything else.
    """
    folder = Path(folder).absolute()
    put_back(folder)
    check_replaceable(folder, *marks)
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = workplace / "new"
        fresh.mkdir()  # mkdtemp's own folder is readable by its owner alone; a result should not be
        yield fresh
        _share(fresh, workplace / "plain")
        _replace(folder, fresh)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _share(folder: Path, plain: Path) -> None:
    """Give files the mode that the new file `plain` gets: safetensors makes them their owner's alone."""
    plain.touch()
    mode = stat.S_IMODE(plain.stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # a file system without modes
                path.chmod(mode)


def check_replaceable(folder: Path, *marks: str) -> None:
    """Raise InputError if `folder` is no folder, or holds files but none of `marks`."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder} is no folder, but one is to be written: move it away, or {ELSEWHERE}")
    if folder.is_dir() and any(folder.iterdir()) and not any(any(folder.glob(mark)) for mark in marks):
        raise InputError(
            f"{folder} holds none of {', '.join(marks)}, so this package did not write it and does not "
            f"replace it: move it away, or {ELSEWHERE}"
        )


def put_back(folder: str | Path) -> None:
    """Put back a folder that a killed process has moved aside, where the new one is not in its place."""
    folder = Path(folder).absolute()
    with suppress(OSError):  # there is none, or this process may only read
        if not folder.exists():
            kept(folder).rename(folder)


def kept(folder: Path) -> Path:
    """Where the previous folder stands while the new one takes its place, if that takes two steps."""
    return folder.with_name(f".{folder.name}.old")


def check_links(folder: Path) -> None:
    """Raise InputError for a link in `folder` that leads out of it, and for what is no file, as a pipe.

    Of such a link a copy would take the target along; a pipe would be waited for.

    Links into the cache of the hub, of which a snapshot consists, are its own files.
    """
    held = sorted(folder.rglob("*"))  # which follows no link to a folder
    if odd := [path for path in held if not path.is_symlink() and not path.is_file() and not path.is_dir()]:
        raise InputError(f"{odd[0]} is no ordinary file, and is not copied along: remove it")
    for path, target, inside in _links(folder, held):
        if not inside or not path.is_file():
            raise InputError(
                f"{path} is a link to {target}, which is not copied along: put the file itself there, or "
                "remove the link"
            )


def check_inside(folder: Path, names: Sequence[str], trusted: Sequence[str] | None = None) -> None:
    """Raise InputError if one of these folders in `folder` is or holds a link that leads out of `folder`.

    What is written to them would stand where the link leads, which whoever made the folder has chosen. A link
    to the whole of `folder` is the caller's own, and targets in `trusted`, as they stand, are allowed.
    """
    own = "" if trusted is None else "; if the link is your own, add 'trust=[{target}]'"
    for name in names:
        place = folder / name
        # what is in a folder that is a link, which may be any folder, does not matter
        held = [] if place.is_symlink() else sorted(place.rglob("*"))
        refuse_links(folder, [place, *held], trusted or (), own)


def refuse_links(folder: Path, paths: Sequence[Path], trusted: Sequence[str] = (), own: str = "") -> None:
    """Raise InputError if one of these paths in `folder` is a link that leads out of it, as `check_inside`.

    `own` ends the message: what to do with a link of one's own, with `{target}` for where it leads.
    """
    for path, target, inside in _links(folder, paths):
        if not inside and str(target) not in trusted:
            raise InputError(
                f"{path} is a link to {target}, outside of {folder}, where files would be written: put "
                f"what it leads to in its place, or remove it{own.replace('{target}', str(target))}"
            )


def _links(folder: Path, paths: Sequence[Path]) -> Iterator[tuple[Path, Path, bool]]:
    """Yield (path, target, whether that is in `folder`) of each of the paths in it that is a link."""
    own = own_places(folder)
    for path in paths:
        if path.is_symlink():
            target = led_to(path)
            yield path, target, lies_in(target, own)


def own_places(folder: Path) -> list[Path]:
    """Where files of `folder` lie: in it, without links, and in the blobs of a hub's snapshot."""
    real = led_to(folder)
    return [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]


def led_to(path: Path) -> Path:
    """Where a path leads, without links and `..`."""
    return Path(os.path.realpath(path))  # Path.resolve raises for links in a circle


def named_twice(paths: Iterable[Path]) -> tuple[Path, Path] | None:
    """The first path that leads where an earlier one does, and that one; None if there is none."""
    named: dict[Path, Path] = {}
    for path in paths:
        place = led_to(path)
        if place in named:
            return path, named[place]
        named[place] = path
    return None


def lies_in(path: Path, places: Sequence[Path]) -> bool:
    """Whether a path without links lies in one of these folders."""
    return any(path.is_relative_to(place) for place in places)


def exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False where the system or its file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = AT_CWD, os.fsencode(one), AT_CWD, os.fsencode(other)
    return rename is not None and rename(*paths, EXCHANGE) == 0


def _replace(folder: Path, fresh: Path) -> None:
    """Move `fresh` to `folder`, and what stands there to the workplace of `fresh`."""
    _clear(folder, fresh.with_name("older"))
    if not folder.exists():
        fresh.rename(folder)
    elif not exchanged(fresh, folder):
        folder.rename(kept(folder))
        try:
            fresh.rename(folder)
        except OSError:
            kept(folder).rename(folder)
            raise
        _clear(folder, fresh.with_name("old"))


def _clear(folder: Path, place: Path) -> None:
    """Move away what was kept of `folder`, before it is removed: what is put back is whole."""
    with suppress(FileNotFoundError):
        kept(folder).rename(place)

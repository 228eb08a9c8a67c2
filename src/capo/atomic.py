"""Files that are there whole under their final name, or not at all."""

import os
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

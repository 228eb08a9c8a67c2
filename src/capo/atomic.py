"""Files that are there whole under their final name, or not at all."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from capo.errors import InputError


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Writes `data` (text as UTF-8) beside `path`, syncs and renames it; makes the folder if need be.

    Raises InputError where the folder cannot be written or the disk is full; what stood there then stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(
                unfinished, 0o644
            )  # mkstemp's files are closed to everyone else, which a result should not be
            os.replace(unfinished, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(unfinished)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room there, or choose another "
            "output directory (hydra.run.dir)"
        ) from error

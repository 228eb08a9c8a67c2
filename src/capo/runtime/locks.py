"""Advisory locks between the processes that share a folder."""

import errno
import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capo.errors import InputError
from capo.runtime.files import REMEDY

LOCK_POLL = 0.1  # seconds


@contextmanager
def file_lock(path: Path, wait: bool = False, remedy: str = REMEDY) -> Iterator[bool]:
    """Context manager that yields whether this process holds the advisory lock `path`; with `wait`, it waits.

    The operating system releases the lock of a process that dies. The file is removed on release; a process
    whose locked file is no longer the one at `path` tries again.
    Raises InputError, with `remedy`, if the folder cannot be written, and for a folder or link at `path`.
    """
    while (handle := _try_lock(path, remedy)) is None and wait:
        time.sleep(LOCK_POLL)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _try_lock(path: Path, remedy: str) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP):  # a folder, or a link, which is not followed
            raise InputError(f"{path} is no ordinary file, as a lock is: remove it") from error
        raise InputError(f"{path.parent} cannot be written ({error.strerror}): {remedy}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except BlockingIOError:
        pass
    except FileNotFoundError:  # removed by its holder between the two calls
        pass
    except OSError as error:
        warnings.warn(
            f"{path.parent}: no advisory locks on this file system ({error.strerror}); "
            "let only one process at a time write there",
            stacklevel=2,
        )
        return handle
    os.close(handle)
    return None

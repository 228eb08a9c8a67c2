"""Log files of scorers: what those in other processes print, and tracebacks of all."""

from __future__ import annotations

import functools
import tempfile
import time
import traceback
from pathlib import Path

from capo.runtime.files import appending


def log_file(name: str, folder: Path | None) -> Path:
    """Return the log of the reward `name`, in `folder` or, with None, in a temporary one of this process."""
    return (folder or _temporary_folder()) / f"{name}.log"


def write_traceback(path: Path, error: BaseException) -> str:
    """Append the traceback of `error` to the log at `path`; return where it is, for a message."""
    text = "".join(traceback.format_exception(error))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appending(path) as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}".encode(errors="backslashreplace"))
    except OSError as fault:
        return f"the traceback could not be written to {path} ({fault.strerror})"
    return f"the traceback is in {path}"


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="capo-workers-"))

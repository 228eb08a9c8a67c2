"""Messages for files and folders that cannot be used: which key of the command line gave them."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

from safetensors import SafetensorError

from capo.runtime.terminal import typed

PLACE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOENT,
    errno.EISDIR,
    errno.EIO,
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WRITING = FULL | {errno.EROFS, errno.EPERM, errno.EEXIST}  # what only a path that is written to can have
WRITTEN = ("hydra.run.dir", "hydra.sweep.dir", "pool.root")  # keys of places that are written to
ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
LONGEST_PATH = 400  # letters of a path in a message
PLACES = "choose another place (hydra.run.dir, hydra.sweep.dir, pool.root)"
ROOM, RESTORED = f"make room there, or {PLACES}", f"restore it, or {PLACES}"


def written_fault(override: str, many: bool) -> str | None:
    """Message for a value that names no folder to write to; None for any other, and for other keys.

    `many`: whether the command starts a multirun, whose jobs have no `hydra.run.dir` of their own.
    """
    key, _, value = override.lstrip("+").partition("=")
    if key not in WRITTEN:
        return None
    path = value.strip("'\"")
    if many and key == "hydra.run.dir":
        return "the jobs of -m go to hydra.sweep.dir; give that, or leave -m out"
    if not path.strip():
        return f"it must name a folder; give {key}=FOLDER, or leave it out"
    if path.split("/")[0] == "~":  # in key=value a shell leaves it as it is
        return f"the folder's name begins with ~; give {typed(key, f'{Path.home()}{path[1:]}')}"
    if path != path.strip():
        return f"the folder's name begins or ends with a blank; give {typed(key, path.strip())}"
    if ADDRESS.match(path):
        return f"files are written to folders alone, not to an address; give {key}=FOLDER"
    return None


def disk_fault(error: BaseException | None) -> str | None:
    """Message for an error that means that a file or folder cannot be written; None for any other error."""
    if isinstance(error, SafetensorError):  # it has the errno only in its text
        known = any(f"(os error {number})" in str(error) for number in PLACE_ERRORS)
        return f"weights cannot be written ({error}): {ROOM}" if known else None
    if not isinstance(error, OSError) or error.errno not in PLACE_ERRORS:
        return None
    lost = error.errno in (errno.ENOENT, errno.EIO)
    remedy = ROOM if error.errno in FULL else RESTORED if lost else PLACES
    if error.errno not in WRITING and (key := _key_of(error.filename)) is not None:
        remedy = f"give another path{f': {key}=PATH' if key else ''}"
    return f"{_short_path(error.filename)} cannot be used ({error.strerror}): {remedy}"


def _key_of(path: object) -> str | None:
    """Key of the command line whose value is the largest part of this path; None for what is written.

    It is empty for an argument without a key.
    """
    found: dict[int, str] = {}
    if not isinstance(path, str):
        return None
    for argument in sys.argv[1:]:
        key, given, value = argument.partition("=")
        key, value = (key, value) if given else ("", argument)  # of a program without keys
        value = value.strip("'\"").rstrip("/")
        # a name that is too long stands in a folder of another key; a short one may be any word
        if value and (f"{path}/".startswith(f"{value}/") or (len(value) > 200 and path.endswith(value))):
            found[len(value)] = key.lstrip("+")
    key = found[max(found)] if found else None
    return None if key in WRITTEN else key


def _short_path(path: object) -> str:
    text = str(path or "a file")
    return text if len(text) <= LONGEST_PATH else f"{text[:LONGEST_PATH]}..."

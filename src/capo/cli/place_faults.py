"""Messages for files and folders that the system refuses: which key of the command line gave them."""

from __future__ import annotations

import errno
import sys

from safetensors import SafetensorError

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
LONGEST_PATH = 400  # letters of a path in a message
PLACES = "choose another place (hydra.run.dir, hydra.sweep.dir, pool.root)"
ROOM, RESTORED = f"make room there, or {PLACES}", f"restore it, or {PLACES}"


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

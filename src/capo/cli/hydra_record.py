"""Restore Hydra's record of a command in the directory of a run, where a later command is refused.

Hydra writes the record, `.hydra/`, before its job begins, over that of the command that made the run.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from capo.errors import InputError
from capo.runtime.files import write_whole

_remembered: dict[Path, bytes] = {}


def remember(folder: Path) -> None:
    """Remember the record of an earlier command in `folder`."""
    _remembered.clear()
    _remembered.update({path: path.read_bytes() for path in folder.glob("*.yaml") if path.is_file()})


def restore() -> None:
    """Write what was remembered, where it is another now; a disk that is full leaves it as it is."""
    for path, content in _remembered.items():
        with suppress(OSError, InputError):
            if path.read_bytes() != content:
                write_whole(path, content)

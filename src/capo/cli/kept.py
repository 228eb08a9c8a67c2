"""Put back what Hydra has written into the directory of a run, where the command is refused.

Hydra records a command in `.hydra/` before its job begins, over the record of the command that made the run.
"""

from __future__ import annotations

from pathlib import Path

from capo.runtime.files import write_whole

_kept: dict[Path, bytes] = {}


def keep(folder: Path) -> None:
    """Remember the files of an earlier command in `folder`, that of Hydra in a run's directory."""
    _kept.clear()
    _kept.update({path: path.read_bytes() for path in folder.glob("*.yaml") if path.is_file()})


def put_back() -> None:
    """Write the files that were remembered, where they are other ones now."""
    for path, content in _kept.items():
        if path.read_bytes() != content:
            write_whole(path, content)

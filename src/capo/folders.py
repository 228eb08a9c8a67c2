"""Folders that appear whole under their final name, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place when the block ends without an exception.

    What stood there before is removed only after the new folder has been moved in; a block that raises leaves
    it as it was.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = workplace / "new"
        fresh.mkdir()  # mkdtemp's own folder is closed to everyone else, which a result should not be
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

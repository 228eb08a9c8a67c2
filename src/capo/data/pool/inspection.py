"""Validity of a pool's files: a valid file is complete, unchanged and made with the pool's settings."""

import logging
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

from capo.data.pool.files import TensorFile
from capo.data.pool.headers import DamagedShard, Header, read_header

log = logging.getLogger(__name__)


class Inspection:
    """Checks files, remembers those found valid, and logs only once why a file is not."""

    def __init__(self):
        self._confirmed: set[tuple] = set()  # (path, inode, modification time, question)
        self.faults: dict[Path, str] = {}  # files that are invalid, and why

    def confirmed(self, path: Path, question: Hashable, look: Callable[[], bool]) -> bool:
        """Result of `look()`; once it was true for `question`, it is not called again until the file changes.

        Raises what `look` raises.
        """
        try:
            file = path.stat()
        except OSError:  # none, a circle of links: `look` tells
            return look()
        key = str(path), file.st_ino, file.st_mtime_ns, question
        if key not in self._confirmed and look():
            self._confirmed.add(key)
        return key in self._confirmed

    def header(
        self, path: Path, check: Callable[[Path, Header], object], verify: bool = False
    ) -> Header | None:
        """Header of a safetensors file, None if it is missing or damaged; `verify` compares the checksum.

        A header for which `check` raises DamagedShard counts as damaged.
        """
        try:
            header = read_header(path)
            check(path, header)
            if verify:
                self.confirmed(path, "checksum", lambda: bool(TensorFile(path, verify=True)))
            return header
        except FileNotFoundError:
            return None
        except DamagedShard as error:
            return self.report(path, error.reason)

    def report(self, path: Path, reason: str) -> None:
        """Log, once per file, that the file at `path` is invalid and why."""
        if path not in self.faults:
            log.warning("%s is not valid: %s; it must be made again", path, reason)
            self.faults[path] = reason

    def matches(self, path: Path, metadata: Mapping[str, str], expected: Mapping[str, str]) -> bool:
        """Whether the metadata of a file contains all of `expected`; logs the keys that differ."""
        wrong = [key for key, value in expected.items() if metadata.get(key) != value]
        if wrong:
            self.report(path, f"its {', '.join(wrong)} differ from the pool's")
        return not wrong

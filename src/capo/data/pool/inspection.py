"""Which files of a pool count: whole, unchanged, and made by what the pool says."""

import logging
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

from capo.data.pool.files import DamagedShard, Header, TensorFile, read_header

log = logging.getLogger(__name__)


class Inspection:
    """Looks at files; remembers what was found right, and reports only once why a file does not count."""

    def __init__(self):
        self._confirmed: set[tuple] = set()  # (path, its inode and time of change, what was asked)
        self._reported: set[Path] = set()

    def confirmed(self, path: Path, question: Hashable, look: Callable[[], bool]) -> bool:
        """`look()`, but once it was true for `question`, not again before the file changes. False without one."""
        try:
            file = path.stat()
        except FileNotFoundError:
            return False
        key = str(path), file.st_ino, file.st_mtime_ns, question
        if key not in self._confirmed and look():
            self._confirmed.add(key)
        return key in self._confirmed

    def header(self, path: Path, verify: bool = False) -> Header | None:
        """Header of a safetensors file, None where it is missing or damaged; `verify` reads the data too."""
        try:
            header = read_header(path)
            if verify:
                self.confirmed(path, "checksum", lambda: bool(TensorFile(path, verify=True)))
            return header
        except FileNotFoundError:
            return None
        except DamagedShard as error:
            return self.report(path, error.reason)

    def report(self, path: Path, reason: str) -> None:
        """Says by a log line that the file at `path` does not count."""
        if path not in self._reported:
            log.warning("%s does not count: %s; it has to be made again", path, reason)
            self._reported.add(path)

    def matches(self, path: Path, metadata: Mapping[str, str], expected: Mapping[str, str]) -> bool:
        """Whether the metadata of a file has all of `expected`."""
        wrong = [key for key, value in expected.items() if metadata.get(key) != value]
        if wrong:
            self.report(path, f"what it says of {', '.join(wrong)} is not what the pool has")
        return not wrong

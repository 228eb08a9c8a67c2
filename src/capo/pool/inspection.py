"""Which files of a pool count: whole, unchanged, and made by what the pool says."""

import logging
from collections.abc import Mapping
from pathlib import Path

from capo.pool.files import DamagedShard, Header, TensorFile, read_header

log = logging.getLogger(__name__)


class Inspection:
    """Looks at files; remembers whose checksum was right, and reports only once why a file does not count."""

    def __init__(self):
        self._verified: set[tuple[Path, int]] = set()  # (path, time of change)
        self._reported: set[Path] = set()

    def header(self, path: Path, verify: bool = False) -> Header | None:
        """Header of a safetensors file, None where it is missing or damaged; `verify` reads the data too."""
        try:
            header = read_header(path)
            if verify and (version := (path, path.stat().st_mtime_ns)) not in self._verified:
                TensorFile(path, verify=True)
                self._verified.add(version)
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

"""Record of the files of a pool whose checksums were compared, shared by all processes of a machine."""

import fcntl
import os
import platform
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from capo.data.pool.files import TensorFile
from capo.data.pool.layout import VERIFIED


class VerifiedFiles:
    """Opens files of the pool in `folder`; each is read whole, for its checksum, by one process of a machine.

    POOL/.verified/HOST has a line for each file that was found undamaged: size, modification time, inode and
    name. A file that has changed since, or that lies on another machine, is verified again. In a pool that
    cannot be written each process verifies what it opens.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / VERIFIED / platform.node()
        self._lines: set[str] = set()
        self._read = 0  # bytes of the record

    def open(self, path: Path) -> TensorFile:
        """Open a file of the pool. Raises DamagedShard, or FileNotFoundError for a missing file."""
        file = TensorFile(path, verify=False)
        name = path.relative_to(self.folder).as_posix()
        line = f"{file.status.st_size} {file.status.st_mtime_ns} {file.status.st_ino} {name}"
        if line not in self._lines:
            with self._turn(name) as record:
                self._update(record)
                if line not in self._lines:
                    file.verify()
                    self._note(record, line)
        return file

    @contextmanager
    def _turn(self, name: str) -> Iterator[int | None]:
        """Yield a handle of the record, while no other process verifies `name`; None if it cannot be written.

        The lock is on a byte of the record whose place follows from the name, so that other files can be
        verified at the same time. The operating system releases it with the handle or the process.
        """
        try:
            self.path.parent.mkdir(exist_ok=True)
            record = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except OSError:
            yield None
            return
        if not stat.S_ISREG(os.fstat(record).st_mode):  # of a pipe nothing can be read at a place
            os.close(record)
            yield None
            return
        try:
            with suppress(OSError):  # a file system without locks: two processes may verify the same file
                fcntl.lockf(record, fcntl.LOCK_EX, 1, zlib.crc32(name.encode()))
            yield record
        finally:
            os.close(record)

    def _update(self, record: int | None) -> None:
        """Read the lines that were added to the record since it was last read."""
        if record is None:
            return
        while part := os.pread(record, 1 << 20, self._read):
            whole = part[: part.rfind(b"\n") + 1]
            if not whole:
                return
            self._lines.update(whole.decode(errors="replace").split("\n"))
            self._read += len(whole)

    def _note(self, record: int | None, line: str) -> None:
        self._lines.add(line)
        if record is not None:
            with suppress(OSError):  # a full disk
                # begins with a line break, in case a killed process left a part of a line
                os.write(record, f"\n{line}\n".encode())

"""Errors of the frozen reference, kept in a file of a pool for later runs that see the same batches."""

from __future__ import annotations

import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capo.data.batch import PreferenceBatch
from capo.data.pool.layout import reference_errors_path
from capo.errors import InputError, ParameterError
from capo.noise import INVERTED
from capo.objectives import Requirements
from capo.runtime.files import write_whole
from capo.runtime.fingerprints import content_fingerprint
from capo.runtime.locks import file_lock
from capo.runtime.reading import open_ordinary

LIMIT = 1_000_000_000  # bytes that all such files of a pool take at most
EVERY = 5.0  # seconds between two writes; a killed process loses the passes since its last one
HEAD = struct.Struct("<16sII")  # of a record: key of the pass, bytes of its errors, CRC-32 of all but itself
KEYED = struct.Struct("<16sI")  # what the CRC-32 covers before the errors
WITHOUT = "or train with trainer.reuse_reference=false"
REMEDY = f"make room there, {WITHOUT}"
log = logging.getLogger(__name__)


def check_reuse(
    needs: Requirements, *, source: str, pinned: float, sharded: bool, frozen: bool = True
) -> None:
    """Raise ParameterError where the reference's errors do not follow from the batch, or are not enough.

    Args:
        needs: what the objective reads.
        source: where noise comes from, one of `capo.noise.SOURCES`.
        pinned: share of the pairs that are pinned to the reference's predictions.
        sharded: whether the networks are sharded over several processes.
        frozen: whether the reference stays the base.
    """
    reasons = {
        f"with noise.source={INVERTED} the latents that the reference sees follow from the policy": source
        == INVERTED,
        "pinned pairs read the reference's predictions, and its errors alone are kept": pinned > 0,
        "this objective reads the reference's predictions, and its errors alone are kept": needs.predictions,
        "with reference=ema the reference follows the policy": not frozen,
        "processes that share a reference in parts have to make every pass together": sharded,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ParameterError("reuse_reference", True, f"must be false, since {reason}")


class ReferenceErrors:
    """Errors of the reference by pass, read from a file of a pool and added to it.

    A pass is a forward pass of the reference on one batch. Its key is a hash of `settings`, of the kind of
    device, and of the samples of the batch in their order (`capo.data.dataset.sample_digest`): latents,
    noise, u and text. Errors are kept by the batch, not by the sample, because rounding in a network can
    depend on what else is in the batch.

    The file begins with a line that holds the settings. Each record after it has a CRC-32. Processes append
    one after another, under a lock. Where a record is not whole, because a process was killed while it wrote
    or because the file was edited, the file is replaced by one of the whole records before it, and a warning
    says so; what followed is computed again.

    Args:
        folder: folder of the pool.
        settings: JSON values on which the reference's errors depend beside the batch.
        limit: bytes that all files of this kind in the pool may take; beyond it nothing is added.

    Attributes:
        path: the file.
        recalled: number of passes that were found here.
        computed: number of passes that were not, and had to be made.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], limit: int = LIMIT):
        fingerprint = content_fingerprint(settings)
        self.path, self.limit = reference_errors_path(folder, fingerprint), limit
        self.recalled = self.computed = 0
        self._identity = bytes.fromhex(fingerprint)
        self._line = f"capo reference errors 1 {json.dumps(settings, sort_keys=True)}\n".encode()
        self._known: dict[bytes, bytes] = {}
        self._pending: list[tuple[bytes, Tensor]] = []
        self._read, self._inode = 0, -1  # bytes of the file that were read, and which file it was
        self._full, self._written = False, time.monotonic()
        self._add(wait=True)

    @property
    def described(self) -> str:
        """Number of passes known, size of the file, bytes of disk for a pair of candidates, and the file."""
        size, pairs = self.path.stat().st_size, sum(len(value) for value in self._known.values()) / 8
        each = f" ({(size - len(self._line)) / pairs:.1f} bytes a pair)" if pairs else ""
        return f"{len(self._known)} passes, {size / 1e6:.3g} MB{each}, in {self.path}"

    def recall(self, batch: PreferenceBatch, candidates: int) -> Tensor | None:
        """Errors (B, k) float32 on the batch's device for the first k `candidates`; None if not known."""
        found = self._known.get(self._key(batch, candidates))
        if found is None:
            return None
        self.recalled += 1
        values = np.frombuffer(found, "<f4").astype(np.float32).reshape(-1, candidates)
        return torch.from_numpy(values).to(batch.u.device)

    def keep(self, batch: PreferenceBatch, errors: Tensor) -> None:
        """Keep the errors (B, k) of a pass; they are written every EVERY seconds, and on `close`."""
        self.computed += 1
        if self._full:
            return
        self._pending.append((self._key(batch, errors.shape[1]), errors.detach().float()))
        if time.monotonic() - self._written > EVERY:
            self._try_add(wait=False)

    def close(self) -> None:
        """Write what has not been written yet."""
        if self._pending:
            self._try_add(wait=True)

    def _key(self, batch: PreferenceBatch, candidates: int) -> bytes:
        if len(batch.digests) != len(batch.prompt_ids):
            raise ValueError("the batch has no digests of its samples: collate it with digests=True")
        told = json.dumps([batch.u.device.type, candidates, batch.digests]).encode()
        return blake2b(self._identity + told, digest_size=16).digest()

    def _try_add(self, wait: bool) -> None:
        """Add what is pending; where that fails, training goes on, and nothing more is kept."""
        try:
            self._add(wait)
        except InputError as error:
            log.warning("errors of the reference are no longer kept: %s", error)
            self._stop()

    def _add(self, wait: bool) -> None:
        """Read what others have added, then add what is pending. Raises InputError."""
        self._written = time.monotonic()
        try:
            with file_lock(self.path.with_name(f".{self.path.name}.lock"), wait, REMEDY) as held:
                if not held:
                    return
                self._read_on()
                self._append()
        except OSError as error:
            raise InputError(f"{self.path} cannot be used ({error.strerror or error}): {REMEDY}") from error

    def _read_on(self) -> None:
        """Read the records that were added since; begin the file, or mend it, where that is needed."""
        if not self.path.exists():
            self._replace()
            return
        with open_ordinary(self.path, _unusable) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._read:  # another process has mended it
                self._inode, self._read = status.st_ino, 0
            if not self._read and file.read(len(self._line)) != self._line:
                log.warning("%s is damaged: its first line is another; it is made again", self.path)
                self._replace()
                return
            self._read = self._read or len(self._line)
            file.seek(self._read)
            rest = file.read()
        found, used = read_records(rest)
        self._known |= found
        self._read += used
        if used < len(rest):
            log.warning(
                "%s is damaged from byte %d on, by an edit or by a process that was killed while it wrote; "
                "that part is made again",
                self.path,
                self._read,
            )
            self._replace()

    def _replace(self) -> None:
        """Write the file anew with all that is known."""
        content = self._line + b"".join(record(key, values) for key, values in self._known.items())
        write_whole(self.path, content, remedy=REMEDY)
        self._read, self._inode = len(content), self.path.stat().st_ino

    def _append(self) -> None:
        """Append what is pending and not known, as far as the limit allows."""
        new = {key: values.cpu().numpy().astype("<f4").tobytes() for key, values in self._pending}
        self._pending = []
        new = {key: values for key, values in new.items() if key not in self._known}
        added = b"".join(record(key, values) for key, values in new.items())
        if not added:
            return
        if self._taken() + len(added) > self.limit:
            log.warning(
                "errors of the reference take %.3g GB in %s, the most that is allowed: no more are kept. "
                "Remove that folder to begin anew",
                self._taken() / 1e9,
                self.path.parent,
            )
            self._stop()
            return
        with self.path.open("ab") as file:
            file.write(added)
        self._known |= new
        self._read += len(added)

    def _stop(self) -> None:
        self._full, self._pending = True, []

    def _taken(self) -> int:
        return sum(path.stat().st_size for path in self.path.parent.glob(f"*{self.path.suffix}"))


def _unusable(path: Path, reason: str) -> InputError:
    return InputError(f"{path} cannot be used ({reason}): move it away, {WITHOUT}")


def record(key: bytes, values: bytes) -> bytes:
    """Bytes of a record: the `key` of a pass (16 bytes), and its errors as little-endian float32."""
    crc = zlib.crc32(values, zlib.crc32(KEYED.pack(key, len(values))))
    return HEAD.pack(key, len(values), crc) + values


def read_records(data: bytes) -> tuple[dict[bytes, bytes], int]:
    """Whole records at the start of `data`, errors by key, and the number of bytes that they take."""
    found: dict[bytes, bytes] = {}
    used = 0
    while used + HEAD.size <= len(data):
        key, length, crc = HEAD.unpack_from(data, used)
        values = data[used + HEAD.size : used + HEAD.size + length]
        if len(values) < length or zlib.crc32(values, zlib.crc32(KEYED.pack(key, length))) != crc:
            break
        found[key] = values
        used += HEAD.size + length
    return found, used

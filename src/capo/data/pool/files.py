"""Files of a pool: atomic writes, checksums, memory-mapped reads, and locks that a dead process releases."""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from capo.errors import InputError
from capo.runtime.files import write_whole

# safetensors dtype -> NumPy dtype to read it with, torch dtype of the result (NumPy has no bfloat16)
DTYPES = {
    "F64": (np.float64, torch.float64),
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
    "I64": (np.int64, torch.int64),
    "I32": (np.int32, torch.int32),
    "I16": (np.int16, torch.int16),
    "I8": (np.int8, torch.int8),
    "U8": (np.uint8, torch.uint8),
    "BOOL": (np.bool_, torch.bool),
}


REMEDY = "make room, or set pool.root to a folder that can be written"


class DamagedShard(InputError):
    """Error for a file of a pool that is truncated or was changed after it was written."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{path} is damaged: {reason}; run generate.py with the same configuration again")


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file."""

    metadata: dict[str, str]
    entries: dict[str, dict]  # name -> dtype, shape, data_offsets
    start: int  # offset of the data, in bytes
    size: int  # expected size of the whole file, in bytes

    def checksum(self, data: memoryview | bytes) -> str:
        """SHA-256 (hex) over the header, as sorted JSON without the checksum itself, and the data."""
        metadata = {key: value for key, value in self.metadata.items() if key != "checksum"}
        digest = hashlib.sha256(json.dumps([metadata, self.entries], sort_keys=True).encode())
        digest.update(data)
        return digest.hexdigest()


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of a pool atomically; the caller must hold its lock, so that there is only one writer."""
    write_whole(path, *parts, remedy=REMEDY)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a standard safetensors file with `metadata` and a checksum in its header."""
    # cloned: safetensors rejects tensors that share memory, such as expanded ones
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    plain = memoryview(save(owned, dict(metadata)))
    header = parse_header(path, plain)
    data = plain[header.start :]
    metadata = header.metadata | {"checksum": header.checksum(data)}
    # sorted, since safetensors' own order is random: the same content gives the same bytes
    complete = {"__metadata__": dict(sorted(metadata.items())), **header.entries}
    raw = json.dumps(complete).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns the data to 8 bytes
    write_file(path, len(raw).to_bytes(8, "little"), raw, data)


def parse_header(path: Path, start_of_file: memoryview | bytes) -> Header:
    """Parse the header from the first bytes of a file. Raises DamagedShard if it is not a valid header."""
    length = int.from_bytes(start_of_file[:8], "little")
    try:
        entries = json.loads(bytes(start_of_file[8 : 8 + length]))
        metadata = entries.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        return Header(metadata, dict(entries), 8 + length, 8 + length + end)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise DamagedShard(path, "its header cannot be read") from error


def read_header(path: Path) -> Header:
    """Read a file's header and check its size, not its data. Raises DamagedShard or FileNotFoundError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        start = length + file.read(min(int.from_bytes(length, "little"), size))
    return whole_header(path, start, size)


def whole_header(path: Path, start_of_file: memoryview | bytes, size: int) -> Header:
    """Parse the header of a file of `size` bytes. Raises DamagedShard if the header implies another size."""
    header = parse_header(path, start_of_file)
    if header.size != size:
        raise DamagedShard(path, f"it has {size} bytes instead of {header.size}")
    return header


class TensorFile:
    """Memory-mapped safetensors file; `arrays` holds views by name, which are read when they are indexed.

    A slice through `safetensors.safe_open` costs 40 us, a view of the mapping 2 us; for latents of a few
    kilobytes this is most of the time. `status` is that of the opened file. Raises DamagedShard or
    FileNotFoundError; with `verify`, also as the method does.
    """

    def __init__(self, path: Path, verify: bool):
        # a single open() call: in pools with more files than may stay open, nearly every visit reopens a file
        with path.open("rb") as file:
            self.status = os.fstat(file.fileno())
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise DamagedShard(path, "it is empty") from error
        self.header = whole_header(path, memoryview(self._map), len(self._map))
        self.path = path
        if verify:
            self.verify()
        self.arrays = {name: self._view(entry) for name, entry in self.header.entries.items()}
        self._dtypes = {name: DTYPES[entry["dtype"]][1] for name, entry in self.header.entries.items()}

    def verify(self) -> None:
        """Read all data and compare its checksum. Raises DamagedShard."""
        data = memoryview(self._map)[self.header.start :]
        if self.header.checksum(data) != self.header.metadata.get("checksum"):
            raise DamagedShard(self.path, "its checksum is not that of its data")

    def _view(self, entry: dict) -> np.ndarray:
        kind, shape = DTYPES[entry["dtype"]][0], entry["shape"]
        count = math.prod(shape)
        offset = self.header.start + entry["data_offsets"][0]
        return np.frombuffer(self._map, kind, count, offset).reshape(shape)

    def tensor(self, name: str, index: Any = ...) -> Tensor:
        """Copy of `arrays[name][index]` as a tensor of the stored dtype."""
        copy, dtype = torch.from_numpy(np.array(self.arrays[name][index])), self._dtypes[name]
        return copy if copy.dtype == dtype else copy.view(dtype)

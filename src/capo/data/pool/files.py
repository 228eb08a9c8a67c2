"""Files of a pool: atomic writes, checksums, and memory-mapped reads."""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from capo.data.pool.headers import DTYPES, DamagedShard, opened, parse_header, whole_header
from capo.runtime.files import write_whole

REMEDY = "make room, or set pool.root to a folder that can be written"


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


class TensorFile:
    """Memory-mapped safetensors file; `arrays` holds views by name, which are read when they are indexed.

    A slice through `safetensors.safe_open` costs 40 us, a view of the mapping 2 us; for latents of a few
    kilobytes this is most of the time. `status` is that of the opened file. Raises DamagedShard or
    FileNotFoundError; with `verify`, also as the method does.
    """

    def __init__(self, path: Path, verify: bool):
        # a single open() call: in pools with more files than may stay open, nearly every visit reopens a file
        with opened(path) as file:
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

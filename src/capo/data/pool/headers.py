"""Headers of safetensors files: what they must say for the data to be read as they describe it."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capo.data.pool.layout import read_range, write_range
from capo.errors import DamagedFile, InputError
from capo.runtime.reading import open_ordinary, parse_object

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
# errors of opening what is no ordinary file: nothing, a folder, a circle of links, a socket
OTHER = (errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENXIO)
MOST_DIMENSIONS = 32  # of an array in NumPy


AGAIN = "run generate.py with the same configuration again, for an imported pool with the stage=import of it"


class DamagedShard(DamagedFile):
    """Error for a file of a pool that was damaged or edited, and that generate.py makes again."""

    form = "{path} is damaged: {reason}; {remedy}"

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason, AGAIN)

    def __reduce__(self):
        return type(self), (self.path, self.reason)


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file of a pool to read its bytes.

    Raises DamagedShard if it is no ordinary file, FileNotFoundError if there is none, and InputError if the
    system does not let it be read: it may be whole, and is not to be replaced.
    """
    try:
        with open_ordinary(path, DamagedShard) as file:
            yield file
    except (DamagedShard, OSError) as error:
        cause = error.__cause__ if isinstance(error, DamagedShard) else error
        if not isinstance(cause, OSError) or cause.errno in OTHER:
            raise
        raise InputError(
            f"{path} cannot be read ({cause.strerror or cause}): let this user read it, or see to the disk, "
            "and give the same command again; the file was left as it is"
        ) from error


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


def parse_header(path: Path, start_of_file: memoryview | bytes) -> Header:
    """Parse the header from the first bytes of a file. Raises DamagedShard if it is not a valid header.

    In a valid one every tensor has a known dtype, and they fill the data one after another.
    """
    if not start_of_file:
        raise DamagedShard(path, "it is empty")
    length = int.from_bytes(start_of_file[:8], "little")
    try:
        if len(start_of_file) < 8 + length:
            raise ValueError(f"it is shorter than its {length} bytes")
        entries = parse_object(bytes(start_of_file[8 : 8 + length]).decode())
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must map names to text")
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: _start(*item)):
            end = _checked(name, entry, end)
        return Header(metadata, entries, 8 + length, 8 + length + end)
    except ValueError as error:
        raise DamagedShard(path, f"its header cannot be read: {error}") from error


def _start(name: str, entry: Any) -> int:
    """First byte of a tensor in the data. Raises ValueError for an entry of another form."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets alone")
    for key in ("shape", "data_offsets"):
        if not isinstance(entry[key], list) or not all(type(n) is int and n >= 0 for n in entry[key]):
            raise ValueError(f"{key} of tensor {name!r} must be a list of whole numbers")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"data_offsets of tensor {name!r} must be two numbers")
    return entry["data_offsets"][0]


def _checked(name: str, entry: dict, place: int) -> int:
    """End of a tensor that begins at `place`. Raises ValueError if its entry says otherwise."""
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype of tensor {name!r} is {entry['dtype']!r}, not one of {', '.join(DTYPES)}")
    if len(entry["shape"]) > MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(entry['shape'])} dimensions")
    size = math.prod(entry["shape"]) * np.dtype(DTYPES[entry["dtype"]][0]).itemsize
    if entry["data_offsets"] != [place, place + size]:
        raise ValueError(f"data_offsets of tensor {name!r} do not fit its dtype and shape")
    return place + size


def read_header(path: Path) -> Header:
    """Read a file's header and check its size, not its data. Raises DamagedShard or FileNotFoundError."""
    with opened(path) as file:
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


def check_text(path: Path, header: Header, prompts: int) -> None:
    """Raise DamagedShard unless the header is one of text embeddings of a row of `prompts`."""
    require(path, header, "fingerprint", "prompts", "checksum")
    for name, entry in header.entries.items():
        if entry["shape"][:1] not in ([1], [prompts]):
            raise DamagedShard(path, f"tensor {name!r} has the shape {entry['shape']} for {prompts} prompts")


def check_latents(path: Path, header: Header, prompts: int | None = None) -> range:
    """Candidates of a file of latents, of as many `prompts` if that is given.

    Raises DamagedShard for a header that is none of latents.
    """
    require(path, header, "fingerprint", "prompts", "checksum", "candidates")
    if header.entries.keys() != {"latents"}:
        raise DamagedShard(
            path, f"it holds {', '.join(sorted(header.entries)) or 'nothing'}, not latents alone"
        )
    dtype, shape = header.entries["latents"]["dtype"], header.entries["latents"]["shape"]
    if dtype != "F16" or len(shape) != 5:
        raise DamagedShard(path, f"its latents are {dtype} of shape {shape}, not F16 with five dimensions")
    if prompts not in (None, shape[0]):
        raise DamagedShard(path, f"its latents are of {shape[0]} prompts, not of {prompts}")
    try:
        candidates = read_range(header.metadata["candidates"])
    except ValueError as error:
        raise DamagedShard(path, f"its candidates are {header.metadata['candidates']!r}") from error
    if len(candidates) != shape[1]:
        raise DamagedShard(
            path, f"its latents are of {shape[1]} candidates, not of {write_range(candidates)}"
        )
    return candidates


def require(path: Path, header: Header, *names: str) -> None:
    """Raise DamagedShard for a header whose metadata lacks one of `names`."""
    if lacking := [name for name in names if name not in header.metadata]:
        raise DamagedShard(path, f"its header has no {', '.join(lacking)}")

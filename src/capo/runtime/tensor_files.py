"""Read and write safetensors files part by part, for weights that memory does not hold whole."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from capo.errors import DamagedFile, InputError
from capo.runtime.files import whole_file
from capo.runtime.reading import open_ordinary
from capo.runtime.weight_files import weight_files

# a run without its outcome goes on from its last checkpoint, and exports the same bytes
AGAIN = "restore it, or export it again (of a run: remove outcome.json, and give its train.py command again)"
PART = 2**20  # elements of a tensor that are read at once, if its rows are no longer
Home = tuple[Path, str, tuple[int, ...]]  # of a tensor: its file, dtype by the format's name, and shape
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_entries(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> (dtype by the format's name, shape) of the tensors of a file, in the file's order.

    Raises InputError if the file cannot be read.
    """
    with readable_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


@contextmanager
def readable_tensors(path: Path) -> Iterator[Any]:
    """Yield an opened safetensors file; DamagedFile for one that cannot be opened or, in the block, read."""
    try:
        with open_ordinary(path, partial(DamagedFile, remedy=AGAIN)) as file:
            if not file.read(1):
                raise DamagedFile(path, "it is empty", AGAIN)
        with safe_open(path, framework="pt") as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # safetensors' own error and those of the system
        raise DamagedFile(path, f"as safetensors: {error}", AGAIN) from error


def tensor_homes(folder: Path, variant: str | None = None) -> dict[str, Home]:
    """Find the tensors of a component's folder by name, in the files that loading reads.

    Raises InputError if there is no such file, or one cannot be read.
    """
    files = weight_files(folder, variant).values()
    if not files:
        raise DamagedFile(folder, "it holds no weights, which are *.safetensors", AGAIN)
    return {
        name: (file, dtype, shape) for file in files for name, (dtype, shape) in tensor_entries(file).items()
    }


def spans(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Rows (first, last + 1) of the parts in which a tensor of this shape is read; none if it is empty."""
    rows, row = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    step = max(1, PART // max(1, row))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)] if row else []


class RowReader:
    """Reads rows of tensors; of a scalar, which has none, the scalar itself.

    A file stays open from call to call, and is opened anew after PART elements, since the pages of an open
    one stay in the process's memory.
    """

    def __init__(self) -> None:
        self._opened: dict[Path, tuple[Any, int]] = {}  # file -> what reads it, and how much it has read

    def __call__(self, path: Path, name: str, span: tuple[int, int]) -> Tensor:
        """Read the rows `span` (first, last + 1) of the tensor `name` of the file `path`."""
        file, read = self._opened.pop(path, (None, PART))
        if read >= PART:
            file, read = safe_open(path, framework="pt"), 0
        part = file.get_slice(name)
        rows = part[span[0] : span[1]] if part.get_shape() else file.get_tensor(name)
        self._opened[path] = file, read + rows.numel()
        return rows


def write_parts(
    path: Path, entries: Mapping[str, tuple[str, Sequence[int]]], parts: Iterator[Tensor]
) -> None:
    """Write a safetensors file atomically from the consecutive parts of its tensors, one at a time.

    Args:
        path: the file.
        entries: name -> (dtype by the format's name, shape), in the order of the file.
        parts: the tensors' parts in that order, each with the dtype of its entry.

    Raises:
        ValueError: the parts have another size in total than `entries` say.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape) in entries.items():
        end = place + math.prod(shape) * _itemsize(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the data is aligned
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for part in parts:
            file.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
        if (written := file.tell() - 8 - len(head)) != place:
            raise ValueError(f"{path}: {written} bytes of tensors were given, not {place}")


def _itemsize(dtype: str) -> int:
    bits = int("".join(filter(str.isdigit, dtype.split("_")[0])) or 8)  # BOOL has none
    return bits // 8

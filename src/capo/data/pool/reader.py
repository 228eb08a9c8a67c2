"""Random access to the latents and text embeddings of a pool, for training."""

import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capo.data.pool.files import TensorFile
from capo.data.pool.headers import check_latents
from capo.data.pool.layout import latents_path, text_path
from capo.data.pool.store import Pool
from capo.data.pool.verified import VerifiedFiles

HANDLES = 4096  # upper limit of open files; many systems allow a process only 1024 (`ulimit -n`)


def most_handles() -> int:
    """Limit of open files: HANDLES, or a quarter of what the system allows this process if that is less."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return HANDLES if allowed == resource.RLIM_INFINITY else max(1, min(HANDLES, allowed // 4))


class PoolReader:
    """Reader of single candidates and text embeddings of a complete pool.

    The first process of a machine that opens a file compares its checksum (`VerifiedFiles`). The reader is
    cheap to pickle: every worker of a data loader opens its own files. Raises DamagedShard (an InputError)
    for a file that has changed since it was written, and FileNotFoundError for a missing file.
    """

    def __init__(self, pool: Pool, handles: int | None = None):
        self.folder = pool.folder
        self.prompts_per_shard = pool.manifest.prompts_per_shard
        self.handles = handles or most_handles()
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[tuple, TensorFile] = OrderedDict()
        self._files = VerifiedFiles(self.folder)
        self._stops: dict[int, list[int]] = {}  # row -> end of the candidate range of each opened block

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "prompts_per_shard": self.prompts_per_shard, "handles": self.handles}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def latents(self, position: int, candidates: Sequence[int]) -> Tensor:
        """Latents (k, C, H, W) float16 of the prompt at `position`, in the order of `candidates`."""
        row, place = divmod(position, self.prompts_per_shard)
        views = [self._candidate(row, place, candidate) for candidate in candidates]
        return torch.from_numpy(np.array(views))  # np.stack is three times as slow for two views

    def text(self, position: int) -> dict[str, Tensor]:
        """Text inputs of the denoiser for the prompt at `position`, without a batch dimension."""
        row, place = divmod(position, self.prompts_per_shard)
        file = self._file(text_path, row)
        # leading dimension 1: the tensor is equal for all prompts of the row
        return {
            name: file.tensor(name, place if len(array) > 1 else 0) for name, array in file.arrays.items()
        }

    def _candidate(self, row: int, place: int, candidate: int) -> np.ndarray:
        """View of one candidate's latent; earlier blocks are opened once, to learn where they end."""
        stops = self._stops.setdefault(row, [])
        while not stops or stops[-1] <= candidate:
            file = self._file(latents_path, row, len(stops))
            stops.append(check_latents(file.path, file.header).stop)
        block = bisect_right(stops, candidate)
        first = stops[block - 1] if block else 0
        return self._file(latents_path, row, block).arrays["latents"][place, candidate - first]

    def _file(self, locate: Callable[..., Path], *numbers: int) -> TensorFile:
        """Open file at `locate(folder, *numbers)`; at the limit, the least recently used one is closed."""
        key = (locate, numbers)
        file = self._open.get(key)
        if file is None:
            file = self._files.open(locate(self.folder, *numbers))
            while len(self._open) >= self.handles:
                self._open.popitem(last=False)
            self._open[key] = file
        else:
            self._open.move_to_end(key)
        return file

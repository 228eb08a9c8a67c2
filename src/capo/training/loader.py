"""Load batches of preference pairs for this process, resuming where an interrupted run stopped."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from capo.data.batch import PreferenceBatch
from capo.data.dataset import Encode, PairDataset, Times, VisitSampler, collate
from capo.errors import InputError
from capo.runtime.launch import launch

WORKERS = 4  # beside a GPU, unless given
PREFETCHED = 2  # batches that a worker keeps ready
SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """What kept a loader from reading a batch, in place of the batch."""

    error: Exception


class Batches(Dataset):
    """Dataset whose batches are collated where they are read; one that cannot be read is a `Refusal`."""

    def __init__(self, dataset: PairDataset, collated: Callable[[list[dict]], PreferenceBatch]):
        self.dataset, self.collated = dataset, collated

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> PreferenceBatch | Refusal:
        """Read the batch of these keys of the dataset."""
        try:
            return self.collated([self.dataset[key] for key in keys])
        except (InputError, OSError) as error:
            return Refusal(error)


class PairLoader(DataLoader):
    """Loader of `Batches`, which raises in this process what one of its workers was refused.

    torch itself would raise another error here, whose message is the worker's traceback.
    """

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, Refusal):
                raise batch.error
            yield batch


def _collated_already(batch: Any) -> PreferenceBatch | Refusal:
    return batch  # `Batches` has collated it


class PreferenceData(L.LightningDataModule):
    """Lightning data module over a `PairDataset`, each of whose visits is evaluated at `times`.

    `batch` is the number of pairs in one forward pass of one process, `workers` the number of loader
    processes; None: WORKERS where training runs on a GPU and their batches fit into shared memory, else none.
    If `encode` is given, prompt embeddings are computed by it instead of read from the pool; it runs where
    batches are collated, which is in the workers if their number is given. Batches do not depend on it.
    The dataset's first batch comes after `begun` others of the training.
    """

    def __init__(
        self,
        dataset: PairDataset,
        batch: int,
        workers: int | None = 0,
        encode: Encode | None = None,
        times: Times | None = None,
        digests: bool = False,
        begun: int = 0,
    ):
        super().__init__()
        self.digests, self.begun = digests, begun
        self.dataset, self.batch, self.workers, self.encode = dataset, batch, workers, encode
        dataset.stored_text, dataset.times = encode is None, times or Times()

    def train_dataloader(self) -> DataLoader:
        """Batches of this process's share of the pairs, starting after those that a resumed run has seen."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # batches seen before the run was interrupted; Lightning itself would restart at the first one
        seen = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else self.begun
        gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        rows = self.dataset.selection.usable.nonzero().flatten().tolist()
        sampler = VisitSampler(rows, self.dataset.seed, self.batch, rank, world, start=seen - self.begun)
        collated = partial(collate, encode=self.encode, digests=self.digests)
        workers = self.workers
        if workers is None:
            # text is encoded by all threads of this process, of which a worker has one
            workers = self._fitting(collated, sampler) if gpu and self.encode is None else 0
        return PairLoader(
            Batches(self.dataset, collated),
            batch_sampler=sampler,
            collate_fn=_collated_already,
            num_workers=workers,
            pin_memory=gpu,
            prefetch_factor=PREFETCHED if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals,
        )

    def _fitting(self, collated: partial[PreferenceBatch], sampler: VisitSampler) -> int:
        """WORKERS, or 0 with a warning if the batches that they keep ready may not fit into shared memory."""
        batch = collated([self.dataset[key] for key in next(iter(sampler))])
        ready = (WORKERS * PREFETCHED + WORKERS) * launch().local_world_size  # those in the making, too
        needed, free = ready * batch.nbytes, shutil.disk_usage(SHARED_MEMORY).free
        if needed <= free:
            return WORKERS
        log.warning(
            "%s has %.1f GB free, and %d loader workers for each device need %.1f GB there: training reads "
            "batches without workers. Raise it (docker run --shm-size=%dg), or set data.workers",
            SHARED_MEMORY,
            free / 1e9,
            WORKERS,
            needed / 1e9,
            needed // 2**30 + 1,
        )
        return 0


def leave_signals(worker: int) -> None:
    """Have a loader worker obey nobody but the training process when it is asked to end.

    Schedulers and terminals signal all processes of a job. If workers ended then, the run would fail before
    its checkpoint.
    """
    numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def wait() -> None:
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()

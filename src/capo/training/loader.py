"""Load batches of preference pairs for this process, resuming where an interrupted run stopped."""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

from capo.data.dataset import Encode, PairDataset, Times, VisitSampler, collate


class PreferenceData(L.LightningDataModule):
    """Lightning data module over a `PairDataset`, each of whose visits is evaluated at `times`.

    `batch` is the number of pairs in one forward pass of one process, `workers` the number of loader
    processes. If `encode` is given, prompt embeddings are computed by it instead of read from the pool; it
    runs where batches are collated, which is in the workers if there are any.
    """

    def __init__(
        self,
        dataset: PairDataset,
        batch: int,
        workers: int = 0,
        encode: Encode | None = None,
        times: Times | None = None,
    ):
        super().__init__()
        self.dataset, self.batch, self.workers, self.encode = dataset, batch, workers, encode
        dataset.stored_text, dataset.times = encode is None, times or Times()

    def train_dataloader(self) -> DataLoader:
        """Batches of this process's share of the pairs, starting after those that a resumed run has seen."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # batches seen before the run was interrupted; Lightning itself would restart at the first one
        seen = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0
        rows = self.dataset.selection.usable.nonzero().flatten().tolist()
        return DataLoader(
            self.dataset,
            batch_sampler=VisitSampler(rows, self.dataset.seed, self.batch, rank, world, start=seen),
            collate_fn=partial(collate, encode=self.encode),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

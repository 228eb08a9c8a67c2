"""The training loader: this process's batches of pairs, from where an interrupted run stopped."""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

from capo.data.dataset import Encode, PairDataset, VisitSampler, collate


class PreferenceData(L.LightningDataModule):
    """The training loader over a `PairDataset`; `batch` pairs a forward pass and process, `workers` loader processes.

    With `encode` the embeddings come from it rather than from the pool; it runs where a batch is put together: in the
    workers, if there are any.
    """

    def __init__(self, dataset: PairDataset, batch: int, workers: int = 0, encode: Encode | None = None):
        super().__init__()
        self.dataset, self.batch, self.workers, self.encode = dataset, batch, workers, encode
        dataset.stored_text = encode is None

    def train_dataloader(self) -> DataLoader:
        """This process's share of the pairs, from where the run before this one stopped."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # batches that a run before this one has seen; Lightning itself would begin at the first
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

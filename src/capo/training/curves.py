"""Rows of the training curves, for every logger."""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning as L

from capo.module import PreferenceModule


class Curves(L.Callback):
    """Log the training figures every `every` optimizer steps, before the checkpoint of that step is written.

    A row holds means over the steps since the last one. Lightning itself logs after the checkpoint, so a run
    resumed from that checkpoint would lack a row. `time/pairs_per_second` is of the wall time between two
    rows, loader and checkpoints included, less what `paused` has added: the seconds, since training began,
    that were spent on something else (validation). `shown` is called with the loss of each row.
    """

    def __init__(
        self,
        every: int,
        paused: Callable[[], float] = float,
        shown: Callable[[float], object] = lambda loss: None,
    ):
        self.every, self.paused, self.shown = every, paused, shown
        self._seen, self._pairs, self._began = 0, 0, 0.0

    def _clock(self) -> float:
        return time.perf_counter() - self.paused()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count optimizer steps from the one at which training starts or resumes."""
        self._seen, self._pairs, self._began = trainer.global_step, 0, self._clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: PreferenceModule, outputs, batch, index: int
    ) -> None:
        """Count pairs; log the figures of the steps since the last row once its last micro-batch is done."""
        self._pairs += len(batch.prompt_ids) // batch.times * trainer.world_size
        step = trainer.global_step
        if step == self._seen or step % self.every:
            return
        figures = module.take_figures(of_all=True)  # which waits for the device, so that the time is right
        now = self._clock()
        figures["time/pairs_per_second"] = self._pairs / (now - self._began)
        self._seen, self._pairs, self._began = step, 0, now
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        self.shown(figures["train/loss"])

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """Write the logged rows to disk before the checkpoint."""
        for logger in trainer.loggers:
            logger.save()

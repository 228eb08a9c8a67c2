"""Exponential moving average of the trained weights, which validation and export use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

AVERAGE = "average"  # entry of a checkpoint


def decay_at(step: int, decay: float) -> float:
    """Decay of the average at an optimizer step: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(L.Callback):
    """Average of a policy's trained weights: `average <- d average + (1 - d) weights` after each step.

    d is `decay_at(step, decay)`. Without a decay there is no average, and everything reads the weights
    themselves. A checkpoint holds whole tensors, also where the weights are sharded.
    """

    def __init__(self, decay: float | None):
        self.decay, self._averages, self._step = decay, {}, 0
        self._stored: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin with the policy's weights, or with the average of the checkpoint that is resumed from."""
        if self.decay is None:
            return
        self._step = trainer.global_step
        self._averages = {name: weight.detach().clone() for name, weight in _trained(module)}
        for name, value in (self._stored or {}).items():
            _fill(self._averages[name], value)
        self._stored = None

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int
    ) -> None:
        """Update the average after an optimizer step."""
        if self.decay is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weight = 1 - decay_at(self._step, self.decay)
        for name, value in _trained(module):
            self._averages[name].lerp_(value, weight)

    @contextmanager
    @torch.no_grad()
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give `module` the averaged weights for the block."""
        self._exchange_with(module)
        try:
            yield
        finally:
            self._exchange_with(module)

    def _exchange_with(self, module: nn.Module) -> None:
        for name, weight in _trained(module) if self._averages else ():
            _exchange(weight, self._averages[name])

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average to a checkpoint."""
        if self.decay is not None:
            checkpoint[AVERAGE] = {name: _whole(value) for name, value in self._averages.items()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a checkpoint's average until the weights are in place."""
        self._stored = checkpoint.get(AVERAGE)


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)


def _exchange(one: Tensor, other: Tensor) -> None:
    kept = one.detach().clone()
    one.copy_(other)
    other.copy_(kept)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _fill(place: Tensor, value: Tensor) -> None:
    value = value.to(place.device)
    place.copy_(
        distribute_tensor(value, place.device_mesh, place.placements) if isinstance(place, DTensor) else value
    )

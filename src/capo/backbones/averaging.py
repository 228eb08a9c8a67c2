"""Moving averages of the trained weights: one to validate and export, and one to serve as the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call

from capo.errors import InputError, ParameterError
from capo.objectives import Requirements

AVERAGE, REFERENCE = "average", "reference"  # entries of a checkpoint


def decay_at(step: int, decay: float) -> float:
    """Decay of the average at an optimizer step: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(L.Callback):
    """Average of a policy's trained weights: `average <- d average + (1 - d) weights` after each step.

    d is `decay_at(step, decay)`. Without a decay there is no average, and everything reads the weights
    themselves. A checkpoint holds whole tensors, also where the weights are sharded.
    """

    entry = AVERAGE

    def __init__(self, decay: float | None):
        self.decay, self._averages, self._step = decay, {}, 0
        self._stored: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin with the policy's weights, or with the average of the checkpoint that is resumed from."""
        if self.decay is None:
            return
        self._step = trainer.global_step
        self._begin(module)
        for name, value in (self._stored or {}).items():
            _fill(self._averages[name], value)
        self._stored = None

    def _begin(self, module: nn.Module) -> None:
        self._averages = {name: weight.detach().clone() for name, weight in _trained(module)}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int
    ) -> None:
        """Update the average after an optimizer step."""
        if self.decay is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if weight := self._share(self._step, self.decay):
            for name, value in _trained(module):
                self._averages[name].lerp_(value, weight)

    def _share(self, step: int, decay: float) -> float:
        """Share of the weights in the average after an optimizer step; 0: the average stays."""
        return 1 - decay_at(step, decay)

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
            checkpoint[self.entry] = {name: _whole(value) for name, value in self._averages.items()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a checkpoint's average until the weights are in place."""
        self._stored = checkpoint.get(self.entry)


class MovingReference(WeightAverage):
    """Reference that follows the policy: `average <- d average + (1 - d) weights`, every `interval` steps.

    It begins as the policy, and so as the base. With d = 0 it is a copy of the policy, renewed every
    `interval` steps. Of a LoRA policy the factors A and B are averaged, each by itself. It is no network of
    its own: the policy computes with the averaged weights in place of its trained ones.

    Args:
        decay: d, from 0 to less than 1; the same at all steps.
        interval: optimizer steps between two updates.

    Raises:
        ParameterError: an argument is out of its range.
    """

    entry = REFERENCE

    def __init__(self, decay: float, interval: int = 1):
        if not 0 <= decay < 1:
            raise ParameterError("decay", decay, "must be a number from 0 to less than 1")
        if interval < 1:
            raise ParameterError("interval", interval, "must be at least 1")
        super().__init__(decay)
        self.interval = interval

    def check(self, needs: Requirements, pinned: float) -> None:
        """Raise ParameterError if the objective reads no reference, or pairs are pinned to the base."""
        if not needs.reference:
            must = "must be null (reference=frozen), since this objective trains without a reference"
            raise ParameterError("decay", self.decay, must)
        if pinned:
            must = f"must be null (reference=frozen) with trainer.pinned={pinned:g}, which pins to the base"
            raise ParameterError("decay", self.decay, must)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin as the policy, or as the checkpoint's reference; InputError for sharded weights.

        Sharded weights are gathered anew in each pass, from the policy's own shards.
        """
        if any(isinstance(weight, DTensor) for _, weight in _trained(module)):
            raise InputError(
                "a moving reference cannot stand in for sharded weights; set trainer.strategy=ddp"
            )
        super().on_train_start(trainer, module)

    def _share(self, step: int, decay: float) -> float:
        return 0.0 if step % self.interval else 1 - decay

    def network(self, module: nn.Module, name: str) -> nn.Module:
        """A view of the submodule `name` of the trained `module`: it has the averaged weights, no gradients.

        The average begins when training does, or with the first call.
        """
        if not self._averages:
            self._begin(module)
        own = {key.removeprefix(f"{name}."): value for key, value in self._averages.items()}
        return _WithWeights(module.get_submodule(name), own)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a checkpoint's reference until the weights are in place; InputError if it holds none."""
        super().on_load_checkpoint(trainer, module, checkpoint)
        if self._stored is None:
            raise InputError(
                "the checkpoint holds no moving reference, so that training cannot go on from it; train "
                "again in another hydra.run.dir"
            )


class _WithWeights(nn.Module):
    """A view of `network` that computes with `weights` in place of its parameters of these names."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]):
        super().__init__()
        self.network = network
        # parameters, since torch rounds products with weights that ask for gradients differently
        self.__dict__["weights"] = {name: nn.Parameter(value) for name, value in weights.items()}

    @torch.no_grad()
    def forward(self, *args, **options):
        """Call the network; autocast keeps no casts of these weights, which only this pass reads."""
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return functional_call(self.network, self.__dict__["weights"], args, options)
        finally:
            torch.set_autocast_cache_enabled(kept)


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

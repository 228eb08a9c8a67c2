"""Signal in the gradient: how far the gradients of the two halves of a batch agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from capo.module import PreferenceModule

EVERY = 10  # optimizer steps between two measurements, unless given
SMALL = 100_000_000  # trained parameters up to which it is measured, unless given: 0.4 GB for a gradient


def gradient_signal(halves: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Signal `<g1, g2> / ((|g1|^2 + |g2|^2) / 2)` of the gradients of two halves of a batch.

    It is 1 where all pairs agree, and 0 on average where the gradient is noise. With the mean mu and the
    variance sigma^2 of a pair's gradient, halves of n pairs have the signal mu^2 / (mu^2 + sigma^2 / n).
    `halves` are the gradients of the mean losses of both halves, parameter by parameter. NaN if all are 0.
    """
    sums = [torch.stack([(a * b).sum(), a.square().sum() + b.square().sum()]) for a, b in halves]
    product, squares = torch.stack(sums).double().sum(0).tolist()
    return 2 * product / squares if squares else math.nan


def pairs_for_balance(signal: float, half: float) -> float:
    """Number of pairs whose gradient is signal and noise in equal parts: `n (1 - s) / s` for halves of n.

    For a small signal s this is n / s. Infinity where s is not positive.
    """
    return half * (1 - signal) / signal if signal > 0 else math.inf


class GradientSignal(L.Callback):
    """Measure the signal in every `every`-th optimizer step, from gradients that the step needs anyway.

    A step's gradient is the sum of those of two parts of its batch. With several micro-batches, that of the
    first half of them is copied when it is there; a batch that is a step by itself goes backward in two
    halves. Either way one more copy of the gradient is held within the step. With several processes nothing
    is measured, nor in a step of a single pair.

    Args:
        every: optimizer steps between measurements; 0: never; None: EVERY if at most SMALL parameters are
            trained, else never.

    Attributes:
        total: sum of the signals measured so far.
        count: their number.
    """

    def __init__(self, every: int | None = 0):
        self.every, self.total, self.count = every, 0.0, 0
        self._parameters: list[nn.Parameter] = []
        self._first: list[Tensor] | None = None  # gradients of the first part
        self._share, self._apart = 0.0, False  # its share of the pairs; whether the parameters' lack it
        self._done = 0  # micro-batches of this step, with the present one

    @property
    def mean(self) -> float:
        """Mean of the signals measured; NaN if there is none."""
        return self.total / self.count if self.count else math.nan

    def on_fit_start(self, trainer: L.Trainer, module: PreferenceModule) -> None:
        """Decide whether to measure."""
        self._parameters = [p for p in module.policy.parameters() if p.requires_grad]
        if self.every is None:
            self.every = EVERY if sum(p.numel() for p in self._parameters) <= SMALL else 0
        elif self.every and trainer.world_size > 1:
            module.print("trainer.signal_every: the signal in the gradient is measured in one process only")
        if trainer.world_size > 1:
            self.every = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: PreferenceModule, batch, index: int) -> None:
        """Have the batch go backward in two halves if it is a step by itself, and due."""
        parts = trainer.accumulate_grad_batches
        self._done = index % parts + 1
        if parts > 1 or len(batch.prompt_ids) // batch.times < 2 or not self._due(trainer):
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of 16-mixed

        def hold(loss: Tensor, share: float) -> None:
            scaled = loss if scaler is None else scaler.scale(loss)
            with torch.autocast(loss.device.type, enabled=False):  # as any backward pass
                found = torch.autograd.grad(scaled, self._parameters, allow_unused=True)
            self._first = [
                torch.zeros_like(p) if part is None else part
                for p, part in zip(self._parameters, found, strict=True)
            ]
            self._share, self._apart = share, True

        module.hold_gradient = hold

    def _due(self, trainer: L.Trainer) -> bool:
        return bool(self.every) and (trainer.global_step + 1) % (self.every or 1) == 0

    def on_after_backward(self, trainer: L.Trainer, module: PreferenceModule) -> None:
        """Copy the gradient of the first half of the micro-batches; measure after the last."""
        parts = trainer.accumulate_grad_batches
        module.hold_gradient = None
        if parts > 1 and self._done == parts // 2 and self._due(trainer):
            self._first = [_gradient(p).clone() for p in self._parameters]
            self._share, self._apart = self._done / parts, False
        elif self._first is not None and self._done == parts:
            signal = self._measured(self._first)
            self._first = None
            if math.isfinite(signal):
                self.total, self.count = self.total + signal, self.count + 1
                module.figures.note({"train/gradient_signal": signal})

    @torch.no_grad()
    def _measured(self, first: list[Tensor]) -> float:
        """Signal of the two parts, after which the parameters have the gradients of both."""

        def halves() -> Iterator[tuple[Tensor, Tensor]]:
            for p, part in zip(self._parameters, first, strict=True):
                rest = _gradient(p) if self._apart else _gradient(p) - part
                yield part / self._share, rest / (1 - self._share)

        signal = gradient_signal(halves())
        if self._apart:
            for p, part in zip(self._parameters, first, strict=True):
                p.grad = part if p.grad is None else p.grad.add_(part)
        return signal

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues with."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the signals that were measured before."""
        self.total, self.count = state_dict["total"], state_dict["count"]

    def advice(self, batch: int, prompts: int) -> str | None:
        """Say whether batch or prompts are too few: a sentence, or None if nothing was measured.

        `batch` is the number of pairs in a step, `prompts` that of prompts with a pair.
        """
        if not self.count:
            return None
        needed = pairs_for_balance(self.mean, batch / 2)
        told = (
            f"signal in the gradient: {self.mean:.2g} between half-batches of {batch // 2} pairs (mean of "
            f"{self.count} steps); "
        )
        if math.isinf(needed):
            return f"{told}none above the noise: raise trainer.batch={batch}, or use more prompts ({prompts})"
        told += f"signal = noise at about {float(f'{needed:.2g}'):,.0f} pairs, and a batch has {batch}: "
        if needed <= batch:
            return f"{told}it is large enough"
        if needed <= prompts:
            return f"{told}it is too small for a sure step; raise trainer.batch, or lower trainer.lr"
        return f"{told}it is too small, and so is the number of prompts ({prompts})"


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

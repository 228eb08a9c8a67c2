"""Optimizers, AdamW and its 8-bit form, and gradient clipping over all processes."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from capo.errors import InputError

ADAMW, ADAMW_8BIT = "adamw", "adamw_8bit"
FUSED_ON = ("cpu", "cuda")
log = logging.getLogger(__name__)


def check_optimizer(name: str) -> None:
    """Raise InputError if the optimizer `name` needs a package or a device that is missing."""
    if name == ADAMW_8BIT and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "trainer.optimizer=adamw_8bit needs bitsandbytes: pip install 'capo[bitsandbytes]', "
            "or choose adamw"
        )
    if name == ADAMW_8BIT and not torch.cuda.is_available():
        raise InputError(
            "trainer.optimizer=adamw_8bit needs a CUDA device, and torch sees none here: choose adamw"
        )


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], lr: float, scaled: bool = False
) -> Optimizer:
    """Build AdamW, or its 8-bit form, without weight decay.

    On devices that support it the step is fused: one pass over the weights in place of a dozen. `scaled` says
    that gradients arrive scaled, as under 16-mixed; the step is then not fused, because a fused one would
    unscale them itself. Raises InputError as `check_optimizer` does.
    """
    if name == ADAMW_8BIT:
        check_optimizer(name)
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # an extra

        return AdamW8bit(parameters, lr=lr, weight_decay=0.0)
    fused = not scaled and all(p.device.type in FUSED_ON and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=fused)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Clip the norm of all gradients to `limit` in place, and return the norm before clipping, a scalar.

    The norm is the same in all processes: sharded gradients are reduced over them, and DDP's are equal
    already.
    """
    moved = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([grad for p in moved if (grad := p.grad) is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(moved, limit, norm)
    return norm


class SkippedSteps:
    """Count of the steps that are skipped because their gradient is not finite.

    Args:
        limit: consecutive such steps after which training should stop.

    Attributes:
        total: all of them so far.
        in_a_row: those since the last step with a finite gradient.
    """

    def __init__(self, limit: int):
        self.limit, self.total, self.in_a_row = limit, 0, 0

    @property
    def too_many(self) -> bool:
        """Whether the limit is reached."""
        return self.in_a_row >= self.limit

    def note(self, norm: Tensor, step: int) -> bool:
        """Count the step whose gradient has this norm; return whether it is skipped, which is logged."""
        skipped = not math.isfinite(norm)
        self.total, self.in_a_row = self.total + skipped, skipped * (self.in_a_row + 1)
        if skipped:
            log.warning(
                "step %d: the gradient norm is %s; the step is skipped (%d so far)",
                step,
                norm.item(),
                self.total,
            )
        return skipped

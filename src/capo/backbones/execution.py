"""How a training step is executed: precision, memory format, compilation, recomputation."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from capo.errors import InputError
from capo.runtime.optimizers import ADAMW

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Execution:
    """Memory and speed of a training step, not its mathematics.

    Apart from `adamw_8bit` and the mixed precisions, settings change results by float32 rounding at most.

    Attributes:
        precision: Lightning's name for the precision; it also decides how the frozen reference is stored.
        optimizer: `adamw` or `adamw_8bit`.
        gradient_checkpointing: store no activations within blocks; the backward pass recomputes them.
        compile: apply torch.compile to the repeated blocks.
        compile_tolerance: largest |h| of the first batch with which compiled blocks may train, as a share of
            the mean dR / beta.
        channels_last: use the channels-last memory format for convolutions.
        half_frozen: store the weights that LoRA leaves frozen in the reference's precision; correct if images
            are generated under the same autocast.
    """

    precision: str = "32-true"
    optimizer: str = ADAMW
    gradient_checkpointing: bool = False
    compile: bool = False
    compile_tolerance: float = 0.01
    channels_last: bool = False
    half_frozen: bool = False

    def check_rounding(self, largest: float, aim: float, told: str) -> None:
        """Warn if |h| of untrained pairs exceeds the tolerated share of the mean dR / beta.

        Args:
            largest: largest |h| of pairs whose policy equals the reference.
            aim: mean dR / beta of these pairs.
            told: both, in a sentence.

        Raises:
            InputError: the blocks are compiled, so that they may round differently by more.
        """
        if largest <= self.compile_tolerance * aim:
            return
        if self.compile:
            raise InputError(
                f"trainer.compile=true: {told}, though policy and reference still have the same weights; set "
                f"trainer.compile=false, or raise trainer.compile_tolerance={self.compile_tolerance:g}"
            )
        log.warning(
            "policy and reference still have the same weights, so h should be 0: this device rounds them "
            "differently"
        )


PLAIN = Execution()

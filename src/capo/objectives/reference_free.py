"""Objectives that need no reference."""

from __future__ import annotations

from torch import Tensor

from capo.objectives.base import PairErrors, requires


@requires(reference=False, loser=False)
def sft(errors: PairErrors, *, beta: float | None = None) -> Tensor:
    """Supervised fine-tuning on the winner (control): its error m+, unweighted, (B,); beta is ignored."""
    return errors.policy_winner

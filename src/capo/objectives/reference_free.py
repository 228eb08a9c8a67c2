"""Objectives that need no reference."""

from __future__ import annotations

from torch import Tensor

from capo.objectives.base import PairErrors, requires


@requires(reference=False, loser=False)
def sft(errors: PairErrors, *, beta: float | None = None) -> Tensor:
    """Fine-tuning on the winner (control): m+ per pair, unweighted, (B,), dtype kept; beta is not used."""
    return errors.policy_winner

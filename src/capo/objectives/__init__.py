"""Objectives: denoising errors and calibrated gap -> loss of each pair. One function an objective, one file a family.

Every objective has the signature `(errors, *, beta, ...) -> (B,)` and declares with `@requires` what it reads, so that nothing
else is computed. docs/extending.md says how to add one.
"""

from capo.objectives.base import (
    Objective,
    PairErrors,
    Requirements,
    implicit_rewards,
    margin,
    requirements,
    requires,
)
from capo.objectives.pairwise import capo, dpo, ipo
from capo.objectives.reference_free import sft

__all__ = [
    "Objective",
    "PairErrors",
    "Requirements",
    "capo",
    "dpo",
    "implicit_rewards",
    "ipo",
    "margin",
    "requirements",
    "requires",
    "sft",
]

"""Objectives: denoising errors and calibrated gap of a pair -> its loss. One file per family of objectives.

Every objective is a function with the signature `(errors, *, beta, ...) -> (B,)` and declares with
`@requires` what it reads, so that the training step computes nothing else. docs/extending.md explains how to
add one.
"""

from capo.objectives.base import (
    Objective,
    PairErrors,
    Predictions,
    Requirements,
    implicit_rewards,
    margin,
    requirements,
    requires,
    scaled_margin,
    try_objective,
)
from capo.objectives.pairwise import capo, dpo, ipo
from capo.objectives.reference_free import sft

__all__ = [
    "Objective",
    "PairErrors",
    "Predictions",
    "Requirements",
    "capo",
    "dpo",
    "implicit_rewards",
    "ipo",
    "margin",
    "requirements",
    "requires",
    "scaled_margin",
    "sft",
    "try_objective",
]

"""Objectives: denoising errors and calibrated gap of a pair -> its loss. One file per family of objectives.

Every objective is a function with the signature `(errors, *, beta, ...) -> (B,)` and declares with
`@requires` what it reads, so that the training step computes nothing else. docs/extending.md explains how to
add one.
"""

from capo.objectives.anchor import Anchor, anchor_penalty
from capo.objectives.averaging import mean_over_times
from capo.objectives.base import (
    Group,
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
from capo.objectives.guarded import guarded, sdpo
from capo.objectives.listwise import capo_group
from capo.objectives.pairwise import capo, dmpo, dpo, hinge, ipo, linear_dpo, smpo
from capo.objectives.reference_free import mapo, sft
from capo.objectives.unpaired import kto

__all__ = [
    "Anchor",
    "Group",
    "Objective",
    "PairErrors",
    "Predictions",
    "Requirements",
    "anchor_penalty",
    "capo",
    "capo_group",
    "dmpo",
    "dpo",
    "guarded",
    "hinge",
    "implicit_rewards",
    "ipo",
    "kto",
    "linear_dpo",
    "mapo",
    "margin",
    "mean_over_times",
    "requirements",
    "requires",
    "scaled_margin",
    "sdpo",
    "sft",
    "smpo",
    "try_objective",
]

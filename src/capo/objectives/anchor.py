"""A penalty on the winner's error above the reference's, for any objective with a reference and a beta.

A loss of the margin alone can fall while the errors of winner and loser both rise. The anchor holds the
winner's: the idea of DPO-Positive (Pal et al. 2024), written with the implicit reward of this package.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from capo.errors import ParameterError
from capo.objectives.base import PairErrors, Requirements, fields_of


@dataclass(frozen=True)
class Anchor:
    """How strongly the winner's error is held.

    Attributes:
        weight: factor of the penalty in the loss; 0: no penalty.
        slack: excess that is free of a penalty, in units of beta w (m+ - r+): a budget by which the policy
            may give up the winner's likelihood.
    """

    weight: float = 0.0
    slack: float = 0.0

    def check(self, needs: Requirements, beta: float | None) -> None:
        """Raise ParameterError if there is a penalty, and the objective has no reference or no beta."""
        if self.weight and not (needs.reference and beta is not None):
            lacking = "beta" if needs.reference else "reference"
            raise ParameterError(
                "weight",
                self.weight,
                f"must be 0, since the objective has no {lacking} and the anchor is relu(beta w (m+ - r+)); "
                "or choose an objective that has both, such as capo",
            )


def anchor_penalty(errors: PairErrors, *, beta: float, slack: float = 0.0) -> Tensor:
    """Penalty `relu(beta w (m+ - r+) - slack)` per pair, (B,), where `-w (m+ - r+)` is the winner's R_theta.

    It is 0 where policy = reference; its gradient reaches the winner alone, and only where its error exceeds
    the reference's by more than the slack.

    Args:
        errors: policy_winner, reference_winner and weight are read.
        beta: positive; that of the objective.
        slack: at least 0.

    Raises:
        ParameterError: if the slack is negative.
        ValueError: if a field is None.
    """
    if slack < 0:
        raise ParameterError("slack", slack, "must be at least 0")
    policy, reference, weight = fields_of(errors, "policy_winner", "reference_winner", "weight")
    return (beta * weight * (policy - reference) - slack).relu().to(errors.policy_winner.dtype)

"""Several times for each pair: the mean of their losses, or the loss of their mean margin."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from capo.errors import ParameterError
from capo.objectives.base import PairErrors, Requirements, fields_of

OUTSIDE, INSIDE = "outside", "inside"
REDUCTIONS = (OUTSIDE, INSIDE)


def check_reduction(reduction: str, needs: Requirements) -> None:
    """Raise ParameterError if the reduction is unknown, or `inside` where the objective has no margin.

    Defined is `inside` for an objective of winner, loser, reference and weight. Without a reference or a
    loser there is no margin, predictions at different times have no mean, and objectives of each candidate
    are no functions of a margin.
    """
    if reduction not in REDUCTIONS:
        raise ParameterError("reduction", reduction, f"must be one of {', '.join(REDUCTIONS)}")
    margin_alone = needs.reference and needs.loser and not (needs.predictions or needs.group)
    if reduction == INSIDE and not margin_alone:
        raise ParameterError(
            "reduction",
            reduction,
            "must be outside, since the objective is no function of a margin of winner and loser against a "
            "reference",
        )


def mean_over_times(errors: PairErrors, times: int) -> PairErrors:
    """Errors of B pairs whose margin is the mean of the margins at `times` times each.

    With means over the T times of a pair, w' = mean(w), and every error m becomes m' = mean(w m) / mean(w).
    So w' (m' - r') = mean(w (m - r)): implicit rewards, and with them the margin h and whatever else is
    linear in w m, are means over the times, while the fields remain weights and errors. `capo` on them is
    (dR - beta mean h)^2, and its mean over the times, the other reduction, is larger by beta^2 times the
    variance of h over the times (Jensen's gap).

    Args:
        errors: (B T,) each, the T times of a pair one after the other; without predictions.
        times: T.

    Returns:
        Errors (B,); equal errors of policy and reference stay equal, bit for bit.

    Raises:
        ValueError: if a field but for predictions is None.
    """
    names = ("policy_winner", "reference_winner", "policy_loser", "reference_loser")
    *own, weight, gap = (
        part.unflatten(0, (-1, times)) for part in fields_of(errors, *names, "weight", "gap")
    )
    mean_weight = weight.mean(1)

    def mean(error: Tensor) -> Tensor:
        return (weight * error).mean(1) / mean_weight

    means = {name: mean(error) for name, error in zip(names, own, strict=True)}
    return replace(errors, weight=mean_weight, gap=gap[:, 0], **means)

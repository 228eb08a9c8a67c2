"""Metric of the validation win-rate (CaPO, B.2), and the figures logged during training."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from capo.objectives import PairErrors, margin
from capo.objectives.base import fields_of
from capo.runtime.processes import gathered
from capo.win_rates import win_rate


class WinRate(Metric):
    """Mean of `win_rate` over prompts, from two sums: the result does not depend on batches or processes."""

    total: Tensor
    prompts: Tensor
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # float32, since some devices lack float64; if K is a power of two, its sums are exact
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, policy_scores: Tensor, base_scores: Tensor) -> None:
        """Add P prompts with scores (P, K) of policy and base. Raises the errors of `win_rate`."""
        rates = win_rate(policy_scores, base_scores)
        self.total += rates.sum().to(self.total.dtype)
        self.prompts += len(rates)

    def compute(self) -> Tensor:
        """Mean win-rate over all prompts added so far, a scalar; NaN before the first update."""
        return self.total / self.prompts


TIME_BINS = 5


@torch.no_grad()
def training_figures(errors: PairErrors, beta: float | None) -> dict[str, Tensor]:
    """Figures that every training step logs, each a scalar mean over the batch.

    They are the winner's error and the weight; the margin h, the gap dR, beta h, the implicit accuracy (share
    of pairs with h > 0, where h = 0 counts 1/2) and the drift m - r of winner and loser. `saturated` is the
    share of pairs with |beta h| >= 1, the largest possible dR and the target of IPO. Without a reference or a
    loser, only error and weight are returned; without a beta, neither beta h nor `saturated`.
    """
    winner, weight = fields_of(errors, "policy_winner", "weight")
    figures = {"train/error_winner": winner.mean(), "train/weight": weight.mean()}
    if errors.reference_winner is None or errors.policy_loser is None:
        return figures
    h = margin(errors)
    reference_winner, loser, reference_loser, gap = fields_of(
        errors, "reference_winner", "policy_loser", "reference_loser", "gap"
    )
    figures |= {
        "train/h": h.mean(),
        "train/dR": gap.mean(),
        "train/accuracy": ((h > 0).float() + 0.5 * (h == 0).float()).mean(),
        "train/drift_winner": (winner - reference_winner).mean(),
        "train/drift_loser": (loser - reference_loser).mean(),
    }
    if beta is not None:
        figures |= {
            "train/beta_h": beta * h.mean(),
            "train/saturated": ((beta * h).abs() >= 1).float().mean(),
        }
    return figures


@torch.no_grad()
def largest_margin(errors: PairErrors, beta: float) -> tuple[float, float]:
    """Largest |h| and mean dR / beta of a batch, over all processes."""
    (gap,) = fields_of(errors, "gap")
    found = gathered((float(margin(errors).abs().max()), float(gap.mean()) / beta))
    return max(h for h, _ in found), sum(aim for _, aim in found) / len(found)


@torch.no_grad()
def drift_by_time(errors: PairErrors, u: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Drift m - r of winner and loser in each fifth of [0, 1), by the u of the pairs.

    The errors are those of B pairs with a reference, u is (B,). Nothing leaves the device. Returns (sum,
    count) scalars by name, such as `drift/winner/u0.2` for u in [0.2, 0.4), for `Figures.note`.
    """
    winner, reference_winner, loser, reference_loser = fields_of(
        errors, "policy_winner", "reference_winner", "policy_loser", "reference_loser"
    )
    drifts = {"winner": winner - reference_winner, "loser": loser - reference_loser}
    inside = (u * TIME_BINS).long()[:, None] == torch.arange(TIME_BINS, device=u.device)  # (B, bins)
    counts = inside.sum(0).unbind()
    figures = {}
    for kind, drift in drifts.items():
        # where, not a product: a drift that is not finite stays in its own fifth
        sums = torch.where(inside, drift[:, None], 0).sum(0).unbind()
        for number, sum_and_count in enumerate(zip(sums, counts, strict=True)):
            figures[f"drift/{kind}/u{number / TIME_BINS:.1f}"] = sum_and_count
    return figures


Number = Tensor | float
Figure = Number | tuple[Number, Number]  # one value, or a sum of values and their count


class Figures:
    """Values of named figures, collected batch by batch and averaged when they are logged."""

    def __init__(self) -> None:
        self._values: dict[str, list[Figure]] = {}

    def note(self, figures: Mapping[str, Figure]) -> None:
        """Add to each figure one value, or a sum with its count; tensors stay on their device until taken."""
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value)

    def take(self, of_all: bool = False) -> dict[str, float]:
        """Mean of each figure since the last call (`of_all`: over all processes); forget the values."""
        totals = self.totals(of_all)
        self._values.clear()
        return {name: total / count for name, (total, count) in totals.items() if count}

    def totals(self, of_all: bool = False) -> dict[str, tuple[float, float]]:
        """(sum, count) of each figure since it was last taken; with `restore`, they outlive the process."""
        parts = [{name: (_total(values, 0), _total(values, 1)) for name, values in self._values.items()}]
        parts = gathered(parts[0]) if of_all else parts
        names = dict.fromkeys(name for part in parts for name in part)
        found = {name: [part[name] for part in parts if name in part] for name in names}
        return {name: (sum(s for s, _ in pairs), sum(n for _, n in pairs)) for name, pairs in found.items()}

    def restore(self, totals: Mapping[str, tuple[float, float]]) -> None:
        """Forget all values and continue from `totals`."""
        self._values = {name: [sum_and_count] for name, sum_and_count in totals.items()}


def _total(values: list[Figure], which: int) -> float:
    """Sum of the values' sums (which = 0) or counts (1); tensors are copied from their device at once."""
    parts = [value[which] if isinstance(value, tuple) else (value, 1.0)[which] for value in values]
    tensors = [part.detach() for part in parts if isinstance(part, Tensor)]
    stacked = torch.stack(tensors).cpu().double().sum().item() if tensors else 0.0
    return sum((part for part in parts if not isinstance(part, Tensor)), stacked)

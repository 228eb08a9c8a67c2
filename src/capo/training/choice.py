"""Choose among policies by their win-rates on the validation prompts; the base takes part with 0.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capo.evaluation.held_out import Rate
from capo.evaluation.statistics import LEVEL
from capo.win_rates import EVEN

MEAN, WORST = "mean", "worst"  # over the rewards: what a policy is judged by
RESAMPLES = 10_000
BLOCK = 1000  # resamples at a time


def monitored(rates: Tensor, monitor: str) -> Tensor:
    """Win-rate by which a policy is judged: the mean over the rewards, or the `worst` reward's.

    rates (..., R): win-rates against the base, of R rewards -> (...).
    """
    return rates.mean(-1) if monitor == MEAN else rates.amin(-1)


def monitored_interval(
    rates: Tensor, monitor: str, seed: int, other: Tensor | None = None
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `monitored`, or of its difference to another policy's.

    Both policies are resampled with the same prompts, so that what is common to them cancels.

    Args:
        rates: (R, P) win-rates against the base, of R rewards on P prompts.
        monitor: `mean` or `worst`.
        seed: seed of the resampling; the same seed gives the same interval.
        other: (R, P) win-rates of another policy on the same prompts, which are subtracted; None: nothing is.

    Returns:
        (low, high).
    """
    draw, prompts = np.random.default_rng(seed), rates.shape[1]
    found = []
    for _ in range(RESAMPLES // BLOCK):
        counts = torch.from_numpy(draw.multinomial(prompts, np.full(prompts, 1 / prompts), BLOCK)).double()
        values = monitored(counts @ rates.double().T / prompts, monitor)
        if other is not None:
            values = values - monitored(counts @ other.double().T / prompts, monitor)
        found.append(values)
    tail = (1 - LEVEL / 100) / 2
    low, high = torch.cat(found).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True)
class Candidate:
    """A policy with its win-rates (R, P) against the base, and the interval of what it is judged by."""

    name: str
    rates: Tensor
    rate: Rate

    @property
    def above_base(self) -> bool:
        """Whether the interval lies above the base's 0.5."""
        return self.rate.low > EVEN


@dataclass
class Choice:
    """Choice of a policy, from win-rates that arrive one policy at a time.

    A later policy takes the place of the chosen one if it is better beyond chance: if the 95 % interval of
    the paired difference lies above 0. Until a policy is better than the base in that sense, the one with
    the highest win-rate is kept.

    Attributes:
        monitor: `mean` or `worst` reward.
        seed: seed of the intervals.
        best: the chosen policy; None before the first offer.
        passed: names of later policies with higher win-rates that do not differ from the chosen one beyond
            chance -> interval of the difference.
    """

    monitor: str = MEAN
    seed: int = 0
    best: Candidate | None = None
    passed: dict[str, tuple[float, float]] = field(default_factory=dict)

    def offer(self, name: str, rates: Mapping[str, Tensor]) -> bool:
        """Offer a policy by its win-rates, reward -> (P,); return whether it is now the chosen one."""
        return self.consider(self.candidate(name, rates))

    def consider(self, found: Candidate) -> bool:
        """Offer a policy whose interval is known already (`candidate`); return as `offer`."""
        if self._better(found):
            self.best, self.passed = found, {}
            return True
        return False

    def candidate(self, name: str, rates: Mapping[str, Tensor]) -> Candidate:
        """A policy with its win-rates, reward -> (P,), and the interval of what it is judged by."""
        stacked = torch.stack([rate.double() for rate in rates.values()])
        value = float(monitored(stacked.mean(-1), self.monitor))
        return Candidate(name, stacked, Rate(value, *monitored_interval(stacked, self.monitor, self.seed)))

    def _better(self, found: Candidate) -> bool:
        best = self.best
        if best is None or (found.above_base and not best.above_base):
            return True
        low, high = monitored_interval(found.rates, self.monitor, self.seed, best.rates)
        higher = found.rate.mean > best.rate.mean
        if higher and best.above_base and low <= 0:
            self.passed[found.name] = low, high
        return low > 0 or (higher and not best.above_base)

    def sentences(self) -> list[str]:
        """Say what was chosen, what does not differ from it, and whether it is below the base.

        Raises ValueError before the first offer.
        """
        if self.best is None:
            raise ValueError("nothing was offered, so nothing was chosen")
        judged = "mean over the rewards" if self.monitor == MEAN else "worst reward"
        told = [f"chosen: {self.best.name}, win-rate {self.best.rate} on validation prompts ({judged})"]
        told += [
            f"{name} is higher, but not beyond chance (95 % interval of the difference {low:+.3f} to "
            f"{high:+.3f}): the earlier one is kept"
            for name, (low, high) in self.passed.items()
        ]
        return [*told, *self.warnings()]

    def warnings(self) -> list[str]:
        """Warning if the chosen policy is not above the base, which has a win-rate of 0.5."""
        if self.best is None or self.best.above_base:
            return []
        return [
            f"{self.best.name} has a win-rate of {self.best.rate}, which is not above the base's 0.5: use "
            "the base, or train with a larger objective.beta, a lower trainer.lr, more prompts or larger "
            "batches"
        ]

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, of plain values."""
        best = self.best and {"name": self.best.name, "rates": self.best.rates.tolist()}
        return {"best": best, "passed": {name: list(found) for name, found in self.passed.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.best, self.passed = None, {}
        if state["best"]:
            rates: Sequence[Sequence[float]] = state["best"]["rates"]
            self.offer(
                state["best"]["name"],
                {str(row): torch.tensor(values, dtype=torch.float64) for row, values in enumerate(rates)},
            )
        self.passed = {name: (low, high) for name, (low, high) in state["passed"].items()}

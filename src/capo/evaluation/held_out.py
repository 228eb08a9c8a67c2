"""Score validation images with rewards not used in training, to detect reward hacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from capo.errors import InputError
from capo.evaluation.statistics import bootstrap_interval
from capo.rewards import Reward
from capo.runtime.reading import cell, read_rows
from capo.runtime.run_folder import CURVES_REMEDY
from capo.win_rates import EVEN

GROUP = "val/held_out"  # prefix of the figures of held-out rewards
# 1 if a held-out reward fell while the rewards used in training rose, else 0; `ALARM/NAME` for each reward
ALARM = f"{GROUP}/alarm"


@dataclass(frozen=True)
class HeldOut:
    """Held-out rewards, and the seed of the bootstrap for their intervals."""

    rewards: Sequence[Reward] = ()
    seed: int = 0


@dataclass(frozen=True)
class Rate:
    """A win-rate against the base with its 95 % interval over prompts."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, per_prompt: Tensor, seed: int) -> Rate:
        """Mean and interval of the win-rates (P,) of the prompts; `seed` seeds the bootstrap."""
        return cls(per_prompt.double().mean().item(), *bootstrap_interval(per_prompt, seed))

    def __str__(self) -> str:
        """Format as `0.634 (0.601 to 0.668)`."""
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Verdict:
    """Win-rates of one validation: the mean over the rewards used in training, and each held-out reward."""

    trained: Rate
    held_out: Mapping[str, Rate]

    @property
    def fallen(self) -> list[str]:
        """Held-out rewards that warn of reward hacking.

        Their interval lies below 0.5, while that of the rewards used in training lies above it.
        """
        return [name for name, rate in self.held_out.items() if rate.high < EVEN < self.trained.low]

    def figures(self) -> dict[str, float]:
        """Figures to log: ALARM is 1 if a held-out reward has fallen, else 0; so is `ALARM/NAME` for each."""
        each = {f"{ALARM}/{name}": float(name in self.fallen) for name in self.held_out}
        return {ALARM: float(bool(self.fallen)), **each}

    def message(self, name: str) -> str | None:
        """Warning in one line about the policy `name`, or None if no held-out reward has fallen."""
        if not self.fallen:
            return None
        falls = ", ".join(f"{name} {self.held_out[name]}" for name in self.fallen)
        return (
            f"{name}: reward hacking? The rewards used in training have win-rate {self.trained} against "
            f"the base, but held out {falls} fell below 0.5: look at the images, and consider a larger "
            "objective.beta, fewer steps, or training on it too"
        )


def judge(trained: Sequence[Tensor], held_out: Mapping[str, Tensor], seed: int) -> Verdict:
    """Compare the win-rates of held-out rewards with those of the rewards used in training.

    Args:
        trained: win-rates (P,) against the base, for each reward used in training.
        held_out: name -> win-rates (P,), for each held-out reward.
        seed: seed of the bootstrap over prompts; the same seed gives the same verdict.
    """
    together = torch.stack(list(trained)).double().mean(0)
    return Verdict(Rate.of(together, seed), {name: Rate.of(rates, seed) for name, rates in held_out.items()})


def by_prompt(parts: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, Tensor]:
    """Merge each process's reward -> {prompt: number} into reward -> (P,), ordered by prompt."""
    merged: dict[str, dict[int, float]] = {}
    for part in parts:
        for name, rates in part.items():
            merged.setdefault(name, {}).update(rates)
    return {
        name: torch.tensor([rates[row] for row in sorted(rates)], dtype=torch.float64)
        for name, rates in merged.items()
    }


def refuse_trained(held_out: Sequence[Reward], trained: Sequence[Reward]) -> None:
    """Raise InputError for a held-out reward that training uses, under the same name or another one."""
    for reward in held_out:
        for own in trained:
            if reward.name == own.name or (reward.scorer, reward.weights, reward.revision) == (
                own.scorer,
                own.weights,
                own.revision,
            ):
                known = (
                    "" if reward.name == own.name else f" (as '{own.name}', with the same scorer and weights)"
                )
                raise InputError(
                    f"validation.held_out: '{reward.name}' is used in training{known}, so it cannot "
                    "detect reward hacking; hold out another reward, or leave it out of "
                    f"rewards={_listed(trained)}"
                )


def _listed(rewards: Sequence[Reward]) -> str:
    return f"[{','.join(reward.name for reward in rewards)}]"


def alarms(curves: str | Path) -> dict[str, list[int]]:
    """Read the alarms of a run from its metrics.csv: held-out reward -> steps at which its alarm is 1.

    A reward without alarms is left out; the result is empty if the file does not exist. Raises DamagedFile.
    """
    path = Path(curves)
    try:
        rows = read_rows(path, CURVES_REMEDY)
    except FileNotFoundError:
        return {}
    start = f"{ALARM}/"
    found: dict[str, list[int]] = {}
    for row in rows:
        for column in (name for name, value in row.items() if name.startswith(start) and value):
            if cell(path, row, column, float, CURVES_REMEDY) == 1:
                step = cell(path, row, "step", int, CURVES_REMEDY)
                found.setdefault(column.removeprefix(start), []).append(step)
    return found


def remark(found: Mapping[str, Sequence[int]]) -> list[str]:
    """Sentences for a report, one per held-out reward in `found` (reward -> steps of its alarms)."""
    return [
        f"{name}, held out of training, fell below the base in validation while the rewards used in training "
        f"rose, at step {', '.join(map(str, steps))}: reward hacking?"
        for name, steps in found.items()
    ]

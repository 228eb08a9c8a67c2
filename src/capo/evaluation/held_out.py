"""Rewards that training does not use, asked of the validation images: what rises only where it is measured is hacked."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from capo.errors import InputError
from capo.evaluation.statistics import bootstrap_interval
from capo.rewards import Reward

GROUP = "val/held_out"  # what the figures of held-out rewards begin with
ALARM = f"{GROUP}/alarm"  # 1 where one of them has fallen while training's own rose; `ALARM/NAME` of each


@dataclass(frozen=True)
class HeldOut:
    """The held-out rewards; `seed` is that of their intervals' bootstrap."""

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
        """From the win-rates (P,) of the prompts."""
        return cls(per_prompt.double().mean().item(), *bootstrap_interval(per_prompt, seed))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Verdict:
    """What one validation says: `trained`, the mean over training's rewards, and each held-out one."""

    trained: Rate
    held_out: Mapping[str, Rate]

    @property
    def fallen(self) -> list[str]:
        """The held-out rewards whose interval lies below one half, where that of training's lies above it."""
        return [name for name, rate in self.held_out.items() if rate.high < 0.5 < self.trained.low]

    def figures(self) -> dict[str, float]:
        """1 or 0 under ALARM, and of each held-out reward under `ALARM/NAME`."""
        each = {f"{ALARM}/{name}": float(name in self.fallen) for name in self.held_out}
        return {ALARM: float(bool(self.fallen)), **each}

    def message(self, step: int) -> str | None:
        """The alarm as one line; None where it does not ring."""
        if not self.fallen:
            return None
        falls = ", ".join(f"{name} {self.held_out[name]}" for name in self.fallen)
        return (
            f"step {step}: reward hacking? The trained rewards win {self.trained} against the base, while held out {falls} "
            "falls: look at the pictures, and consider a larger objective.beta, fewer steps, or training on it too"
        )


def judge(trained: Sequence[Tensor], held_out: Mapping[str, Tensor], seed: int) -> Verdict:
    """The verdict on win-rates against the base.

    Args:
        trained: (P,) a reward that training uses, one number a prompt.
        held_out: name -> (P,) of those that it does not use.
        seed: of the bootstrap over prompts; the same one gives the same verdict.
    """
    together = torch.stack(list(trained)).double().mean(0)
    return Verdict(Rate.of(together, seed), {name: Rate.of(rates, seed) for name, rates in held_out.items()})


def by_prompt(parts: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, Tensor]:
    """Reward -> (P,), from what each process found: reward -> {prompt: number}; the order of processes changes nothing."""
    merged: dict[str, dict[int, float]] = {}
    for part in parts:
        for name, rates in part.items():
            merged.setdefault(name, {}).update(rates)
    return {
        name: torch.tensor([rates[row] for row in sorted(rates)], dtype=torch.float64)
        for name, rates in merged.items()
    }


def refuse_trained(held_out: Sequence[Reward], trained: Sequence[Reward]) -> None:
    """InputError for a reward that is held out and trained: by its name, or the same scorer under another one."""
    for reward in held_out:
        for own in trained:
            if reward.name == own.name or (reward.scorer, reward.weights, reward.revision) == (
                own.scorer,
                own.weights,
                own.revision,
            ):
                known = (
                    ""
                    if reward.name == own.name
                    else f" (there as '{own.name}', the same scorer and weights)"
                )
                raise InputError(
                    f"validation.held_out: '{reward.name}' is one of the rewards that are trained{known}, so it cannot tell whether they "
                    f"are hacked; hold out another one, or leave it out of rewards={_listed(trained)}"
                )


def _listed(rewards: Sequence[Reward]) -> str:
    return f"[{','.join(reward.name for reward in rewards)}]"


def alarms(curves: str | Path) -> dict[str, list[int]]:
    """Reward -> the steps at which its alarm rang, of a run's metrics.csv; empty where none did, or there is no file."""
    try:
        with Path(curves).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return {}
    start = f"{ALARM}/"
    found: dict[str, list[int]] = {}
    for row in rows:
        for column, value in row.items():
            if column and column.startswith(start) and value and float(value) == 1:
                found.setdefault(column.removeprefix(start), []).append(int(row["step"]))
    return found


def remark(found: Mapping[str, Sequence[int]]) -> list[str]:
    """A sentence a reward whose alarm rang, for people."""
    return [
        f"{name}, held out of training, fell below the base in validation while the trained rewards rose, at step "
        f"{', '.join(map(str, steps))}: reward hacking?"
        for name, steps in found.items()
    ]

"""Move a tuned policy back towards the base, and choose how far on the validation prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capo.backbones.lora import is_output_factor
from capo.evaluation.held_out import Rate
from capo.module import PreferenceModule
from capo.runtime.files import write_json
from capo.runtime.run_folder import STRENGTH
from capo.runtime.schema import key
from capo.runtime.stored import Record, read_record
from capo.runtime.terminal import typed
from capo.training.choice import Candidate, Choice
from capo.training.validation import Place, WinRateValidation

FULL = 1.0  # strength of the policy as it was trained


class Point(Record):
    """Win-rates at one strength."""

    strength: float = key("share of the way from the base to the trained policy")
    rewards: dict[str, float] = key("win-rates by reward")


class StoredStrength(Record):
    """What is read of strength.json."""

    curve: list[Point] = key("points by strength")


@torch.no_grad()
def set_strength(module: PreferenceModule, trained: Mapping[str, Tensor], strength: float) -> None:
    """Give the policy the weights `base + strength (trained - base)`, tensor by tensor, in place.

    Of a LoRA adapter, whose base is 0, the product B A is scaled. Strength 1 gives the trained policy and 0
    the base, bit for bit.

    Args:
        module: its policy is not sharded and on the CPU.
        trained: name in the module -> trained weight; it may be mapped from a file.
        strength: share of the way from the base to the trained policy.
    """
    own = dict(module.policy.named_parameters())
    base = {} if module.lora else dict(module.backbone.trainable_copy().named_parameters())
    for name, value in trained.items():
        name = name.removeprefix("policy.")
        weight = own[name]
        if module.lora:
            weight.copy_(value * strength if is_output_factor(name) else value)
        else:  # lerp is exact at both ends
            weight.copy_(torch.lerp(base[name].to(weight), value.to(weight), strength))


@dataclass(frozen=True)
class StrengthCurve:
    """Win-rates on validation prompts by strength, and the strength that was chosen.

    Attributes:
        chosen: the strength of the exported policy.
        rate: what that policy is judged by, with its interval.
        points: strength -> {"win_rate": {"mean", "low", "high"}, "rewards": reward -> win-rate}.
    """

    chosen: float
    rate: Rate
    points: Mapping[float, Mapping[str, Any]]

    def lines(self) -> list[str]:
        """One line per strength: `strength 0.5: 0.532 (0.510 to 0.553)  alignment 0.512  looks 0.552`."""
        return [
            f"{_name(strength)}: {Rate(**point['win_rate'])}  "
            + "  ".join(f"{reward} {value:.3f}" for reward, value in point["rewards"].items())
            for strength, point in self.points.items()
        ]

    def write(self, folder: Path) -> None:
        """Write the curve to `strength.json` in a run directory."""
        points = [{"strength": strength, **point} for strength, point in self.points.items()]
        write_json(folder / STRENGTH, {"chosen": self.chosen, "curve": points})


def choose_strength(
    module: PreferenceModule,
    validation: WinRateValidation,
    trained: Mapping[str, Tensor],
    strengths: Sequence[float],
    place: Place,
) -> tuple[StrengthCurve, Choice]:
    """Validate the trained policy at each strength, and give the module's policy the best one.

    A checkpoint that was validated during training is not validated again at strength 1. A lower strength
    takes its place only if it is better beyond chance (`capo.training.choice`).

    Args:
        module: its policy is not sharded and on the CPU.
        validation: the validation; its choice is the trained checkpoint, or empty.
        trained: name in the module -> trained weight.
        strengths: strengths to try besides 1.
        place: where images are sampled.
    """
    best = validation.choice.best
    names = [reward.name for reward in validation.rewards]
    choice = Choice(validation.choice.monitor, validation.choice.seed)
    found: dict[float, Candidate] = {}
    for strength in dict.fromkeys([FULL, *strengths]):
        if strength == FULL and best:
            rates = dict(zip(names, best.rates, strict=True))
        else:
            set_strength(module, trained, strength)
            module.policy.to(place.device)
            rates = validation.validate(module.policy, place, _name(strength)).rates
            module.policy.to("cpu")
        found[strength] = choice.candidate(_name(strength), rates)
        choice.consider(found[strength])
    chosen = next(a for a in found if choice.best and _name(a) == choice.best.name)
    set_strength(module, trained, chosen)
    points = {
        strength: {
            "win_rate": vars(at.rate),
            "rewards": dict(zip(names, at.rates.mean(-1).tolist(), strict=True)),
        }
        for strength, at in sorted(found.items())
    }
    return StrengthCurve(chosen, found[chosen].rate, points), choice


def read_strength(folder: Path) -> dict[str, Any] | None:
    """Read `strength.json` of a run directory; None if there is none."""
    remedy = f"remove it, or choose again: evaluate.py {typed('run', folder)} validation.strengths=[...]"
    try:
        return read_record(folder / STRENGTH, StoredStrength, remedy)
    except FileNotFoundError:
        return None


def _name(strength: float) -> str:
    return f"strength {strength:g}"

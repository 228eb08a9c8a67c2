"""Label sources: what orders the candidates of a prompt, a reward's scores or the choices of people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from capo.rewards import Reward

# Log-odds between two ranks: sigmoid(1000) is 1 in any precision and sigmoid(-1000) is 0, so a choice between two has dR = 1.
CERTAIN = 1000.0


class LabelSource(Protocol):
    """A number for each candidate in a pool, under `key`, and how calibration reads it (`capo.calibration`)."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def link(self) -> str: ...

    @property
    def scale(self) -> float: ...

    @property
    def range(self) -> tuple[float, float] | None: ...


@dataclass(frozen=True)
class HumanChoices:
    """Who was preferred, as ranks (0 the worst) that were stored when the pool was imported; no scorer computes them.

    `key` is part of the pool's layout: another one would orphan the choices of every imported pool.
    """

    name: str = "human"
    key: str = "human-f2a3c335"
    link: str = "identity"
    scale: float = CERTAIN
    range: tuple[float, float] | None = None


HUMAN = HumanChoices()


def scored(labels: Sequence[LabelSource]) -> list[Reward]:
    """Those of `labels` that a scorer computes from images."""
    return [label for label in labels if isinstance(label, Reward)]


def described(labels: Sequence[LabelSource]) -> str:
    """What orders the candidates, for summaries and model cards."""
    rewards = scored(labels)
    return (
        "scored by " + ", ".join(reward.name for reward in rewards) if rewards else "ordered by human choice"
    )

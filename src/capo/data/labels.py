"""Label sources: a reward's scores or human choices, which order the candidates of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeGuard

from torch import Tensor

from capo.calibration import calibrate
from capo.rewards import Reward

# Log-odds between adjacent ranks: sigmoid(1000) is 1 and sigmoid(-1000) is 0 in any precision, so the gap dR
# of a choice between two images is exactly 1.
CERTAIN = 1000.0


class LabelSource(Protocol):
    """Source of one number per candidate, stored in the pool under `key`.

    Attributes:
        graded: whether its numbers are graded scores, whose spread has a meaning, rather than ranks.
        stored: whether its numbers were stored at import; if not, a `Reward` computes them.
    """

    graded: ClassVar[bool]
    stored: ClassVar[bool]

    @property
    def name(self) -> str:
        """Name in configurations and reports."""
        ...

    @property
    def key(self) -> str:
        """Name of its folder of scores in a pool."""
        ...

    @property
    def link(self) -> str:
        """Link that calibration applies to its numbers (`capo.calibration`)."""
        ...

    @property
    def scale(self) -> float:
        """Factor of its numbers in calibration."""
        ...

    @property
    def range(self) -> tuple[float, float] | None:
        """Usual lowest and highest number, for reports; None: not stated."""
        ...


@dataclass(frozen=True)
class HumanChoices:
    """Human choices, as ranks (0 the worst) that were stored when the pool was imported; they need no scorer.

    `key` is part of the pool's layout: with another key, the choices of existing pools would not be found.
    """

    name: str = "human"
    graded: ClassVar[bool] = False
    stored: ClassVar[bool] = True
    key: str = "human-f2a3c335"
    link: str = "identity"
    scale: float = CERTAIN
    range: tuple[float, float] | None = None


HUMAN = HumanChoices()


def calibrated(scores: Tensor, labels: Sequence[LabelSource], method: str) -> Tensor:
    """Calibrate raw scores (P, N, L) of L sources by their links and scales; errors as `calibrate`."""
    links, scales = [label.link for label in labels], [label.scale for label in labels]
    return calibrate(scores, links, scales, method, [label.name for label in labels])


def scored(labels: Sequence[LabelSource]) -> list[Reward]:
    """Label sources that are rewards, computed from images by a scorer."""
    return [label for label in labels if _is_reward(label)]


def _is_reward(label: LabelSource) -> TypeGuard[Reward]:
    return not label.stored


def described(labels: Sequence[LabelSource]) -> str:
    """Phrase for summaries and model cards that says what orders the candidates."""
    rewards = scored(labels)
    return (
        "scored by " + ", ".join(reward.name for reward in rewards) if rewards else "ordered by human choice"
    )

"""Rounds of training: which steps train on the candidates of which policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from capo.data.prompts import Prompt


@dataclass(frozen=True)
class Round:
    """A part of training, in which all pairs are of one policy's candidates.

    Attributes:
        number: 0 is the round of the base's candidates.
        first: optimizer steps before the round; the policy after them has drawn the candidates.
        last: the step that the round ends with.
    """

    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"step{self.first:06d}"

    def seed(self, seed: int) -> int:
        """Seed of its draws of prompts, pairs, times and noise; that of the run in the first round."""
        if not self.number:
            return seed
        digest = hashlib.blake2b(f"{seed}/round/{self.number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    def prompts(self, prompts: Sequence[Prompt], count: int | None) -> Sequence[Prompt]:
        """Prompts whose candidates are drawn anew: all, or `count` of them, which later rounds go on from.

        With a count, rounds take consecutive parts of the set, and begin at its start again after its end.
        """
        if count is None:
            return prompts
        first = (self.number - 1) * count
        return [prompts[(first + i) % len(prompts)] for i in range(count)]


def rounds_left(step: int, every: int | None, steps: int) -> Iterator[Round]:
    """Yield the rounds of `every` steps that a run of `steps` has left after `step`; None: one round in all.

    After the last step, its round is left: there is nothing to train, and the run can be finished.
    """
    every = every or steps
    for number in range(min(step, steps - 1) // every, refreshes(every, steps) + 1):
        yield Round(number, number * every, min((number + 1) * every, steps))


def refreshes(every: int | None, steps: int) -> int:
    """How often the candidates are drawn anew in a run of `steps`."""
    return (steps - 1) // every if every else 0


def validations(step: int, steps: int, every: int, rounds: int | None = None) -> int:
    """Number of validations after `step`: every `every` steps, at ends of rounds, and after `steps`."""
    ends = {end for period in (every, rounds or steps) for end in range(period, steps, period)} | {steps}
    return sum(end > step for end in ends)

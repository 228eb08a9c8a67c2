"""A strategy applied to a whole pool: which pairs can be drawn, how many there are, and the draw itself."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capo.pairs import PairSets, Strategy, combined_rewards
from capo.runtime.threads import over_rows

# Candidates compared at a time: PyTorch splits 2^15 elements over threads, and waiting for one another costs
# more than that gains, ten times as much where other processes run on the same cores.
BLOCK = 2**14


@dataclass(frozen=True)
class PairStatistics:
    """What a selection came to, over all prompts.

    Attributes:
        prompts, usable: number of prompts, and of those with a pair that can be drawn.
        skipped_share: share of prompts without one.
        winners, losers: mean size of X+ and of X- per prompt, in candidates.
        winners_share, losers_share: the same as shares of the candidates.
        pairs: mean number of pairs that can be drawn, over the usable prompts (0 where there is none).
    """

    prompts: int
    usable: int
    skipped_share: float
    winners: float
    losers: float
    winners_share: float
    losers_share: float
    pairs: float


@dataclass(frozen=True)
class Selection:
    """What a strategy selected in a pool, and what can be drawn from it.

    Attributes:
        winners, losers: (P, N) bool masks.
        rewards: (P, N) calibrated rewards combined over the rewards; the difference of two is their dR.
        pairs: (P,) int64 number of pairs that can be drawn.
    """

    winners: Tensor
    losers: Tensor
    rewards: Tensor
    pairs: Tensor

    @property
    def usable(self) -> Tensor:
        """(P,) bool: prompts with a pair that can be drawn."""
        return self.pairs > 0

    def draw(self, prompt: int, draw: Callable[[int], int]) -> tuple[int, int]:
        """(winner, loser) of the prompt in row `prompt`; see `draw_pair`."""
        return draw_pair(self.winners[prompt], self.losers[prompt], self.rewards[prompt], draw)

    def statistics(self) -> PairStatistics:
        """Sizes of X+ and X- and the share of prompts that are skipped. Raises ValueError for P = 0."""
        prompts, candidates = self.winners.shape
        if prompts == 0:
            raise ValueError("a selection of no prompts has no statistics")
        usable = int(self.usable.sum())
        winners, losers = self.winners.sum().item() / prompts, self.losers.sum().item() / prompts
        return PairStatistics(
            prompts=prompts,
            usable=usable,
            skipped_share=1 - usable / prompts,
            winners=winners,
            losers=losers,
            winners_share=winners / candidates,
            losers_share=losers / candidates,
            pairs=self.pairs.sum().item() / max(usable, 1),
        )


def select(strategy: Strategy, scores: Tensor, calibrated: Tensor) -> Selection:
    """Apply a strategy to all prompts: scores and calibrated rewards (P, N, L) -> `Selection`.

    With no prompts, (0, N, L), it only finds out whether the strategy fits L rewards, before any score is
    there. Raises what the strategy raises.
    """
    sets = strategy(scores, calibrated)
    rewards = combined_rewards(calibrated, gap_weights(strategy))
    return Selection(sets.winners, sets.losers, rewards, count_pairs(sets, rewards))


def gap_weights(strategy: Strategy) -> Sequence[float] | None:
    """The `weights` that a strategy was given (read through `functools.partial`), its default, or None."""
    parameter = inspect.signature(strategy).parameters.get("weights")
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def pair_matrix(winners: Tensor, losers: Tensor, rewards: Tensor) -> Tensor:
    """Which (winner, loser) can be drawn: masks (..., N) and combined rewards (..., N) -> bool (..., N, N).

    `[i, j]` is true where i may win, j may lose, and dR = rewards[i] - rewards[j] > 0.
    """
    allowed = winners[..., :, None] & losers[..., None, :]
    return allowed & (rewards[..., :, None] > rewards[..., None, :])


def count_pairs(sets: PairSets, rewards: Tensor) -> Tensor:
    """Number of pairs that can be drawn from each prompt: the sum of `pair_matrix`, which is never held.

    Args:
        sets: masks (P, N).
        rewards: (P, N) combined rewards (`combined_rewards`).

    Returns:
        (P,) int64; 0 where the prompt has to be skipped.
    """
    prompts, candidates = rewards.shape
    counts = torch.zeros(prompts, dtype=torch.int64, device=rewards.device)
    block = max(BLOCK // candidates, 1)

    def count_rows(where: slice) -> None:
        for start in range(where.start, where.stop, block):
            rows = slice(start, min(start + block, where.stop))
            high = rewards[rows].masked_fill(~sets.winners[rows], -math.inf).T.contiguous()
            low = rewards[rows].masked_fill(~sets.losers[rows], math.inf).T.contiguous()
            beaten, above = torch.zeros_like(high), torch.empty_like(high)
            for loser in low:  # compared into floats, since comparisons into bools are not vectorized
                beaten += torch.gt(high, loser, out=above)
            counts[rows] = beaten.sum(0).long()

    over_rows(count_rows, prompts, 4 * block, rewards.device)
    return counts


def draw_pair(
    winners: Tensor, losers: Tensor, rewards: Tensor, draw: Callable[[int], int]
) -> tuple[int, int]:
    """Draw one pair of a prompt, uniformly over winners x losers with dR > 0.

    Args:
        winners, losers: (N,) bool masks of one prompt.
        rewards: (N,) combined rewards.
        draw: for n, an integer uniform on 0 ... n - 1; `integers` of a `numpy.random.Generator` is exactly
            uniform.

    Returns:
        Indices (winner, loser) of two candidates.

    Raises:
        ValueError: there is no pair to draw (`count_pairs` tells beforehand).
    """
    pairs = pair_matrix(winners, losers, rewards).flatten().nonzero()
    if len(pairs) == 0:
        raise ValueError(
            "no pair with dR > 0 to draw; leave out prompts that `Selection.usable` does not mark"
        )
    return divmod(int(pairs[int(draw(len(pairs)))]), len(rewards))

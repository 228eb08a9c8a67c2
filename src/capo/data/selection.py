"""Selection of pairs in a whole pool: which pairs a strategy allows, how many there are, and drawing one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from capo.errors import InputError
from capo.pairs import PairSets, Strategy, argument, combined_rewards, declaration
from capo.runtime.own_code import faults_of, name_of
from capo.runtime.threads import over_rows

# Candidates compared at a time. PyTorch splits tensors of 2^15 elements over threads, whose synchronization
# costs more than they gain, and ten times as much if other processes use the same cores.
BLOCK = 2**14


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of a selection over all prompts.

    Attributes:
        prompts: number of prompts.
        usable: number of prompts with at least one pair that can be drawn.
        skipped_share: share of prompts without such a pair.
        winners: mean number of candidates in X+ per prompt.
        losers: mean number of candidates in X- per prompt.
        pairs: mean number of pairs that can be drawn from a usable prompt; 0 if no prompt is usable.
    """

    prompts: int
    usable: int
    skipped_share: float
    winners: float
    losers: float
    pairs: float


@dataclass(frozen=True)
class Selection:
    """Winners and losers that a strategy selected in a pool, and the pairs that can be drawn from them.

    Attributes:
        winners: (P, N) bool mask of the candidates that may win, X+.
        losers: (P, N) bool mask of the candidates that may lose, X-.
        rewards: (P, N) calibrated rewards averaged over the rewards; the difference of two is their dR.
        pairs: (P,) int64 number of pairs that can be drawn.
    """

    winners: Tensor
    losers: Tensor
    rewards: Tensor
    pairs: Tensor

    @property
    def usable(self) -> Tensor:
        """Mask (P,) of the prompts with a pair that can be drawn."""
        return self.pairs > 0

    def draw(self, prompt: int, draw: Callable[[int], int]) -> tuple[int, int]:
        """Draw a pair (winner, loser) of the prompt in row `prompt`; see `draw_pair`."""
        return draw_pair(self.winners[prompt], self.losers[prompt], self.rewards[prompt], draw)

    def statistics(self) -> PairStatistics:
        """Statistics over all prompts. Raises ValueError for P = 0."""
        prompts = len(self.winners)
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
            pairs=self.pairs.sum().item() / max(usable, 1),
        )


def select(strategy: Strategy, scores: Tensor, calibrated: Tensor) -> Selection:
    """Apply a strategy to all prompts: scores and calibrated rewards (P, N, L) -> `Selection`.

    With P = 0 it checks whether the strategy fits L rewards, which needs no scores. Raises InputError if the
    strategy raises or does not return two bool masks (P, N).
    """
    what = f"the pairs strategy {name_of(strategy)}"
    with faults_of(f"{what} on scores and calibrated rewards of shape {tuple(scores.shape)}"):
        sets = strategy(scores.clone(), calibrated.clone())  # whatever it does to them
        weights = argument(strategy, declaration(strategy).weights)
    if (fault := _fault(sets, calibrated)) is not None:
        raise InputError(
            f"{what} returned {fault}; it must return capo.pairs.PairSets(winners, losers), two bool masks "
            f"{tuple(calibrated.shape[:2])}, (P, N) for P prompts with N candidates"
        )
    rewards = combined_rewards(calibrated, weights)
    return Selection(sets.winners, sets.losers, rewards, count_pairs(sets, rewards))


def _fault(sets: object, calibrated: Tensor) -> str | None:
    """What is wrong with a strategy's result; None if nothing is."""
    if not isinstance(sets, PairSets):
        return f"a {type(sets).__name__}"
    for name, mask in zip(sets._fields, sets, strict=True):
        if not isinstance(mask, Tensor):
            return f"{name} that are a {type(mask).__name__}"
        if (mask.dtype, mask.shape, mask.device) != (torch.bool, calibrated.shape[:2], calibrated.device):
            return f"{name} of shape {tuple(mask.shape)}, {mask.dtype}, on {mask.device}"
    return None


def pair_matrix(winners: Tensor, losers: Tensor, rewards: Tensor) -> Tensor:
    """Pairs that can be drawn: masks (..., N) and combined rewards (..., N) -> bool (..., N, N).

    Element `[i, j]` is true if i may win, j may lose, and dR = rewards[i] - rewards[j] > 0.
    """
    allowed = winners[..., :, None] & losers[..., None, :]
    return allowed & (rewards[..., :, None] > rewards[..., None, :])


def count_pairs(sets: PairSets, rewards: Tensor) -> Tensor:
    """Number of pairs that can be drawn from each prompt: the sum of `pair_matrix`, without its memory.

    Args:
        sets: masks (P, N) of winners and losers.
        rewards: (P, N) combined rewards (`combined_rewards`).

    Returns:
        (P,) int64; 0 for a prompt that must be skipped.
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
            for loser in low:  # float output, since comparisons with bool output are not vectorized
                beaten += torch.gt(high, loser, out=above)
            counts[rows] = beaten.sum(0).long()

    over_rows(count_rows, prompts, 4 * block, rewards.device)
    return counts


def draw_pair(
    winners: Tensor, losers: Tensor, rewards: Tensor, draw: Callable[[int], int]
) -> tuple[int, int]:
    """Draw one pair of a prompt, uniformly over the pairs of winners x losers with dR > 0.

    Args:
        winners: (N,) bool mask of the candidates that may win.
        losers: (N,) bool mask of the candidates that may lose.
        rewards: (N,) combined rewards.
        draw: function n -> random integer, uniform on 0 ... n - 1, such as `integers` of a
            `numpy.random.Generator`, which is exactly uniform.

    Returns:
        Indices (winner, loser) of two candidates.

    Raises:
        ValueError: if no pair can be drawn (`count_pairs` is 0).
    """
    pairs = pair_matrix(winners, losers, rewards).flatten().nonzero()
    if len(pairs) == 0:
        raise ValueError(
            "no pair with dR > 0 to draw; leave out prompts for which `Selection.usable` is false"
        )
    return divmod(int(pairs[int(draw(len(pairs)))]), len(rewards))

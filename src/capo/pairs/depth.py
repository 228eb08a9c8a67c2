"""Winners and losers beyond the frontiers (pairs.depth): the next fronts, by rank and crowding distance."""

import numpy as np
import torch
from torch import Tensor

from capo.pairs.fronts import frontiers
from capo.runtime.threads import over_rows

BLOCK = 2**16  # comparisons of two candidates at a time, so that they fit in the caches


def deep_frontiers(scores: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """X+ and X- (`frontiers`), where either has fewer than `depth` candidates widened to so many.

    X+ takes further candidates by their rank: those on F+, then those on the front of the rest, and so on
    (non-dominated sorting). Of a front that does not fit as a whole it takes those of the largest crowding
    distance (`crowding`), and among ties the lowest index. A candidate of X- is never taken: X+ stays smaller
    where no other is left. X- is widened likewise from below. A candidate that neither dominates nor is
    dominated may enter both; of a pair, the one of the higher mean calibrated reward wins, as ever.

    Args:
        scores: (P, N, L) finite raw scores.
        depth: smallest number of candidates in each set.

    Returns:
        Two bool masks (P, N). Negated scores exchange them; they do not change under an increasing affine map
        of a reward, whose distances the crowding compares.

    Raises:
        InputError, ValueError: as `fronts` does.
    """
    upper, lower = frontiers(scores)
    found = []
    for sign, own, others in ((1, upper, lower), (-1, lower, upper)):
        widened = own.clone()
        rows = (own.sum(1) < depth).nonzero().flatten()
        if len(rows):
            widened[rows] = _widened(sign * scores[rows].double(), own[rows], others[rows], depth)
        found.append(widened)
    return found[0], found[1]


def _widened(scores: Tensor, own: Tensor, others: Tensor, depth: int) -> Tensor:
    """(P, N, L) float64 scores, masks (P, N) of the set and of the opposite one -> the widened set's mask."""
    values, mine, taken = scores.cpu().numpy(), own.cpu().numpy(), others.cpu().numpy()
    prompts, candidates, _ = values.shape
    result = mine.copy()
    count = max(BLOCK // candidates**2, 1)

    def widen(where: slice) -> None:
        for start in range(where.start, where.stop, count):
            rows = slice(start, min(start + count, where.stop))
            columns = np.ascontiguousarray(values[rows].transpose(2, 1, 0))
            result[rows] |= _fill(columns, mine[rows].T, taken[rows].T, depth).T

    over_rows(widen, prompts, 4 * count, torch.device("cpu"))
    return torch.from_numpy(result).to(own.device)


def _fill(columns: np.ndarray, own: np.ndarray, others: np.ndarray, depth: int) -> np.ndarray:
    """(L, N, C) scores, one prompt per column, masks (N, C) -> mask (N, C) of the candidates to add."""
    free = ~(own | others)
    rank = ranks(columns)
    extremes, distance = crowding(columns, rank)
    # the first key of lexsort counts last; it is stable, so that ties go to the lowest index
    order = np.lexsort((-distance, -extremes, rank, ~free), axis=0)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(len(order))[:, None], axis=0)
    return free & (place < depth - own.sum(0))


def ranks(columns: np.ndarray) -> np.ndarray:
    """Non-dominated ranks (N, C) of (L, N, C) scores: 0 on F+, 1 on the F+ of the rest, and so on."""
    first, second = columns[:, :, None], columns[:, None]
    as_good = np.logical_and.reduce(first >= second)  # [i, j, c]: i is as good as j by every reward
    dominates = as_good & ~as_good.swapaxes(0, 1)
    rank = np.zeros(columns.shape[1:], dtype=np.int64)
    left = np.ones_like(rank, dtype=bool)
    while True:
        left = left & (dominates & left[:, None]).any(0)  # those that another of them dominates
        if not left.any():
            return rank
        rank += left


def crowding(columns: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crowding distance of each candidate in its front, for a choice of the best (after NSGA-II).

    By a reward, a candidate lies between the next one above and the next one below it in its front; their
    distances are counted as shares of the front's range. The best of a front has none above it: it counts as
    infinitely far by that reward. The worst counts its distance to the next one above twice, where NSGA-II
    keeps it like the best, since the worst by a reward is no reason to win.

    Args:
        columns: (L, N, C) finite float scores, one prompt per column.
        rank: (N, C) rank of each candidate's front.

    Returns:
        Two arrays (N, C): by how many rewards the candidate is the best of its front, and the sum of its
        distances by the others. Duplicates are at distance 0 from each other.
    """
    front = rank[:, None] == rank[None]  # [i, j, c]: j is in the front of i
    other = front & ~np.eye(len(rank), dtype=bool)[:, :, None]
    extremes, distance = np.zeros(rank.shape, dtype=np.int64), np.zeros(rank.shape)
    for values in columns:
        apart = values[None] - values[:, None]  # [i, j, c]: how far j lies above i
        gap_above = np.where(other & (apart >= 0), apart, np.inf).min(1)
        gap_below = np.where(other & (apart <= 0), -apart, np.inf).min(1)
        highest = np.where(front, apart, -np.inf).max(1)
        extent = highest - np.where(front, apart, np.inf).min(1)
        best = highest == 0
        gaps = gap_above + np.where(np.isinf(gap_below), gap_above, gap_below)
        extremes += best
        shares = np.divide(gaps, extent, out=np.zeros_like(gaps), where=~best & (extent > 0))
        distance += shares
    return extremes, distance

"""Compute figures that describe the scores, calibrated rewards and pairs of a pool.

`capo.evaluation.reports.calibration_advice` turns them into warnings and advice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from capo.calibration import LINKS
from capo.data.labels import LabelSource
from capo.data.selection import Selection
from capo.data.spread import Spread, spread
from capo.evaluation.reports.calibration_figures import (
    CalibrationReport,
    FrontierShares,
    Histogram,
    PairFigures,
    RewardFigures,
)
from capo.pairs import Strategy, argument, declaration, fronts

TARGET = 0.7  # a suggested scale gives the better of two candidates this median win-rate
BINS = 41  # of a histogram; odd, so that a win-rate of 0.5 is the center of a bin
MOST_PAIRS = 2**24  # maximum number of pairs of a median; in larger pools, evenly spaced prompts are used
EXAMPLES = 5  # number of skipped prompts that are listed
SIMULATED = 4000  # simulated prompts; the standard error of a share of prompts is below 0.008


def calibration_report(
    scores: Tensor,
    calibrated: Tensor,
    selection: Selection,
    rewards: Sequence[LabelSource],
    prompts: Sequence[str],
    method: str,
    strategy: Strategy,
) -> CalibrationReport:
    """Compute the figures of a scored pool; takes seconds for 100 000 prompts x 16 candidates x 3 rewards.

    Args:
        scores: (P, N, L) raw scores.
        calibrated: (P, N, L) rewards calibrated by `capo.calibration.calibrate` with `method`.
        selection: winners and losers selected by `strategy`.
        rewards: L label sources, in the order of the scores.
        prompts: P texts, from which skipped prompts are listed.
        method: a key of `capo.calibration.METHODS`.
        strategy: pairs strategy, read for its name and arguments.

    Raises:
        ValueError: P = 0 or N < 2.
    """
    raw, rated = spread(scores), spread(calibrated)
    columns = zip(rewards, scores.unbind(-1), calibrated.unbind(-1), raw, rated, strict=True)
    figures = {
        reward.name: _reward_figures(reward, own, rating, before, after, method)
        for reward, own, rating, before, after in columns
    }
    selected = pair_figures(selection, prompts, strategy)
    several = len(rewards) > 1
    frontier = frontier_shares(scores) if several else None
    independent = independent_frontier(scores.shape[1], len(rewards)) if several else None
    return CalibrationReport(
        len(scores),
        scores.shape[1],
        method,
        figures,
        rank_correlation(scores),
        selected,
        frontier,
        independent,
    )


def _reward_figures(
    reward: LabelSource, scores: Tensor, calibrated: Tensor, raw: Spread, rated: Spread, method: str
) -> RewardFigures:
    """Figures of one reward from its (P, N) scores and calibrated rewards, and the spreads of both."""
    values, bounds = scores.numpy(), (0.0, 1.0) if method == "win_rate" else (None, None)
    declared = None if reward.range is None else (float(reward.range[0]), float(reward.range[1]))
    graded = reward.graded
    gap = median_gap(scores, reward.link) if graded else None
    return RewardFigures(
        link=reward.link,
        scale=reward.scale,
        declared=declared,
        seen=(float(values.min()), float(values.max())),
        outside=None if declared is None else float(((values < declared[0]) | (values > declared[1])).mean()),
        deviation=raw.std if graded else None,
        spread=rated.std,
        flat=rated.flat if graded and not math.isnan(rated.flat) else None,
        saturated=rated.saturated if graded and not math.isnan(rated.saturated) else None,
        median_gap=gap,
        pair_win_rate=None if gap is None else 1 / (1 + math.exp(-reward.scale * gap)),
        suggested_scale=None if gap is None else scale_for(gap),
        raw=histogram(values) if graded else None,
        calibrated=histogram(calibrated.numpy(), *bounds),
    )


def histogram(
    values: np.ndarray, low: float | None = None, high: float | None = None, bins: int = BINS
) -> Histogram:
    """Histogram of `values`, by default from the lowest to the highest.

    If these are equal, the range is one unit wide around the value.
    """
    low, high = float(values.min() if low is None else low), float(values.max() if high is None else high)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    # float64, since float32 cannot resolve the bins of values that differ by rounding noise only
    counts, _ = np.histogram(values.astype(np.float64), bins=bins, range=(low, high))
    return Histogram(low, high, counts.tolist())


def median_gap(scores: Tensor, link: str) -> float:
    """Median of |link(a) - link(b)| over all pairs of candidates of a prompt, in log-odds at scale 1.

    `scores`: (P, N) raw scores. If there are more than MOST_PAIRS pairs, evenly spaced prompts are used.
    """
    candidates = scores.shape[1]
    first, second = np.triu_indices(candidates, 1)
    step = math.ceil(len(scores) * len(first) / MOST_PAIRS)
    # (N, P'): one row per candidate
    log_odds = np.ascontiguousarray(LINKS[link].to_log_odds(scores[::step].float()).numpy().T)
    return float(np.median(np.abs(log_odds[first] - log_odds[second])))


def scale_for(gap: float, target: float = TARGET) -> float | None:
    """Scale at which a pair with this gap has win-rate `target`, logit(target) / gap; None for a gap of 0."""
    return math.log(target / (1 - target)) / gap if gap > 0 else None


def rank_correlation(scores: Tensor) -> list[list[float | None]]:
    """Spearman's rank correlation within a prompt, averaged over prompts: (P, N, L) -> L x L.

    Ties get the mean of their ranks. Prompts in which one of the two rewards is constant are left out; the
    entry is None if no prompt remains.
    """
    ranks = rankdata(scores.numpy(), axis=1).transpose(2, 0, 1)  # (L, P, N)
    ranks -= (scores.shape[1] + 1) / 2
    norms = np.sqrt(np.square(ranks).sum(-1))
    return [
        [_mean_correlation(a, b, p, q) for b, q in zip(ranks, norms, strict=True)]
        for a, p in zip(ranks, norms, strict=True)
    ]


def _mean_correlation(
    first: np.ndarray, second: np.ndarray, first_norm: np.ndarray, second_norm: np.ndarray
) -> float | None:
    both = (first_norm > 0) & (second_norm > 0)
    if not both.any():
        return None
    products = np.einsum("pn,pn->p", first, second)
    return float((products[both] / (first_norm[both] * second_norm[both])).mean())


def pair_figures(selection: Selection, prompts: Sequence[str], strategy: Strategy) -> PairFigures:
    """Set sizes, numbers of pairs and skipped prompts of a selection; `prompts` holds the P texts."""
    candidates = selection.winners.shape[1]
    winners, losers = (
        torch.bincount(mask.sum(1), minlength=candidates + 1).tolist()
        for mask in (selection.winners, selection.losers)
    )
    skipped = (~selection.usable).nonzero().flatten().tolist()
    pairs_ = selection.pairs[selection.usable].double()
    extent = (
        (int(pairs_.min()), float(np.median(pairs_.numpy())), int(pairs_.max()))
        if len(pairs_)
        else (0, 0.0, 0)
    )
    mean = pairs_.mean().item() if len(pairs_) else 0.0
    examples = [prompts[int(row)] for row in skipped[:EXAMPLES]]
    lower = argument(strategy, declaration(strategy).lower_set)
    return PairFigures(strategy_name(strategy), winners, losers, extent, mean, len(skipped), examples, lower)


def frontier_shares(scores: Tensor) -> FrontierShares:
    """Mean shares of a prompt's candidates in the frontiers, from (P, N, L) raw scores."""
    upper, lower = fronts(scores)
    winners, losers = upper & ~lower, lower & ~upper
    return FrontierShares(*(mask.float().mean().item() for mask in (upper, winners, losers, ~losers.any(1))))


@functools.cache
def independent_frontier(candidates: int, rewards: int) -> FrontierShares:
    """`frontier_shares` of independent rewards without ties, over SIMULATED prompts drawn with a fixed seed.

    They are simulated because the sizes of X+ and X- have no closed form. The expected size of F+ has one:
    A(N, L) = sum_{k <= N} A(k, L - 1) / k with A(N, 1) = 1.
    """
    return frontier_shares(
        torch.rand(SIMULATED, candidates, rewards, generator=torch.Generator().manual_seed(0))
    )


def strategy_name(strategy: Strategy) -> str:
    """Name of a strategy with the bound arguments that are not None, e.g. `frs(lower=frontier)`."""
    function, given = getattr(strategy, "func", strategy), getattr(strategy, "keywords", {})
    arguments = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    return getattr(function, "__name__", type(function).__name__) + (f"({arguments})" if arguments else "")

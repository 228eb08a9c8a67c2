"""What scores, calibrated rewards and pairs of a pool look like, in figures; `capo.evaluation.reports.calibration_advice` says what to change."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from capo import pairs
from capo.calibration import LINKS, Spread, spread
from capo.data.selection import Selection
from capo.pairs import Strategy

TARGET = 0.7  # median win-rate of the better of two candidates that a scale is suggested for
BINS = 41  # of a histogram; odd, so that a win-rate of 0.5 stands in the middle of a bin
MOST_PAIRS = 2**24  # pairs that a median is taken of; of larger pools, prompts at even distances
EXAMPLES = 5  # skipped prompts that are named
SIMULATED = 4000  # prompts of independent scores; the standard error of a share of prompts is below 0.008


class Described(Protocol):
    """What the report reads of a `Reward`."""

    name: str
    link: str
    scale: float
    range: Sequence[float] | None


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: list[int]


@dataclass(frozen=True)
class RewardFigures:
    """One reward. None: not available (no win-rates, or a human choice, which is a rank and no score).

    Attributes:
        link, scale, declared: of its yaml; `declared` is the usual lowest and highest score.
        seen: lowest and highest score in the pool; `outside`: share of the scores outside of `declared`.
        deviation: standard deviation of the raw scores within a prompt, root mean square over prompts.
        spread, flat, saturated: of the calibrated rewards, see `capo.calibration.Spread`.
        median_gap: median over pairs of candidates of a prompt of |link(a) - link(b)|.
        pair_win_rate: median win-rate of the better of two candidates of a prompt, `sigmoid(scale * median_gap)`.
        suggested_scale: the scale at which that would be TARGET; None where half of the pairs are ties: no scale helps.
        raw, calibrated: histograms over all candidates.
    """

    link: str
    scale: float
    declared: tuple[float, float] | None
    seen: tuple[float, float]
    outside: float | None
    deviation: float | None
    spread: float
    flat: float | None
    saturated: float | None
    median_gap: float | None
    pair_win_rate: float | None
    suggested_scale: float | None
    raw: Histogram | None
    calibrated: Histogram


@dataclass(frozen=True)
class PairFigures:
    """What was selected: `winners[k]`, `losers[k]` is the number of prompts with k candidates in X+, in X-.

    `pairs`: lowest, median and highest number of pairs that can be drawn from a prompt, of those with one; `mean_pairs` their
    mean; `skipped`: prompts without one, the first of them named in `examples`; `lower`: the argument of `frs`, None of others.
    """

    strategy: str
    winners: list[int]
    losers: list[int]
    pairs: tuple[int, float, int]
    mean_pairs: float
    skipped: int
    examples: list[str]
    lower: str | None = None


@dataclass(frozen=True)
class Frontier:
    """Mean shares of a prompt's candidates: `undominated` in the upper frontier F+, `winners` in X+, `losers` in X-.

    `empty`: share of prompts in which no candidate dominates another, so that X+ and X- are empty.
    """

    undominated: float
    winners: float
    losers: float
    empty: float


@dataclass(frozen=True)
class CalibrationReport:
    """All figures; `correlation[i][j]` is the rank correlation of rewards i and j (None: nowhere defined), in their order.

    `frontier` and `independent` (the same number of independent rewards): None with one reward.
    """

    prompts: int
    candidates: int
    method: str
    rewards: dict[str, RewardFigures]
    correlation: list[list[float | None]]
    selection: PairFigures
    frontier: Frontier | None
    independent: Frontier | None


def calibration_report(
    scores: Tensor,
    calibrated: Tensor,
    selection: Selection,
    rewards: Sequence[Described],
    prompts: Sequence[str],
    method: str,
    strategy: Strategy,
    chosen: bool = False,
) -> CalibrationReport:
    """The figures of a scored pool; some seconds for 100 000 prompts x 16 candidates x 3 rewards.

    Args:
        scores, calibrated: (P, N, L) raw scores, and what `method` made of them (`capo.calibration.calibrate`).
        selection: what `strategy` selected.
        rewards: L of them, in the scores' order.
        prompts: P texts, to name those that are skipped.
        method: a key of `capo.calibration.METHODS`.
        strategy: for its name and arguments.
        chosen: the one reward is a human choice, whose scores are ranks and whose win-rates are certain on purpose.

    Raises ValueError for P = 0 or N < 2.
    """
    raw, rated = spread(scores), spread(calibrated)
    columns = zip(rewards, scores.unbind(-1), calibrated.unbind(-1), raw, rated, strict=True)
    figures = {reward.name: _reward_figures(reward, *column, method, chosen) for reward, *column in columns}
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
    reward: Described,
    scores: Tensor,
    calibrated: Tensor,
    raw: Spread,
    rated: Spread,
    method: str,
    chosen: bool,
) -> RewardFigures:
    """Of one reward: (P, N) scores and calibrated rewards, and their spreads."""
    values, bounds = scores.numpy(), (0.0, 1.0) if method == "win_rate" else (None, None)
    declared = None if reward.range is None else (float(reward.range[0]), float(reward.range[1]))
    gap = None if chosen else median_gap(scores, reward.link)
    return RewardFigures(
        link=reward.link,
        scale=reward.scale,
        declared=declared,
        seen=(float(values.min()), float(values.max())),
        outside=None if declared is None else float(((values < declared[0]) | (values > declared[1])).mean()),
        deviation=None if chosen else raw.std,
        spread=rated.std,
        flat=None if chosen or math.isnan(rated.flat) else rated.flat,
        saturated=None if chosen or math.isnan(rated.saturated) else rated.saturated,
        median_gap=gap,
        pair_win_rate=None if gap is None else 1 / (1 + math.exp(-reward.scale * gap)),
        suggested_scale=None if gap is None else scale_for(gap),
        raw=None if chosen else histogram(values),
        calibrated=histogram(calibrated.numpy(), *bounds),
    )


def histogram(
    values: np.ndarray, low: float | None = None, high: float | None = None, bins: int = BINS
) -> Histogram:
    """Of all `values`, from the lowest to the highest where no bounds are given; a single value stands in a bin of width 1 / bins."""
    low, high = float(values.min() if low is None else low), float(values.max() if high is None else high)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(
        values.astype(np.float64), bins=bins, range=(low, high)
    )  # float32 has no room for bins in rounding noise
    return Histogram(low, high, counts.tolist())


def median_gap(scores: Tensor, link: str) -> float:
    """Median over the pairs of candidates of a prompt of |link(a) - link(b)|: (P, N) raw scores -> log-odds at scale 1.

    Of more than MOST_PAIRS pairs: prompts at even distances.
    """
    candidates = scores.shape[1]
    first, second = np.triu_indices(candidates, 1)
    step = math.ceil(len(scores) * len(first) / MOST_PAIRS)
    log_odds = np.ascontiguousarray(
        LINKS[link].to_log_odds(scores[::step].float()).numpy().T
    )  # a row a candidate
    return float(np.median(np.abs(log_odds[first] - log_odds[second])))


def scale_for(gap: float, target: float = TARGET) -> float | None:
    """The scale at which a pair with this gap has win-rate `target`: logit(target) / gap. None for a gap of 0."""
    return math.log(target / (1 - target)) / gap if gap > 0 else None


def rank_correlation(scores: Tensor) -> list[list[float | None]]:
    """Spearman's correlation within a prompt, averaged over prompts: (P, N, L) -> L x L.

    Ties have the mean of their ranks. Prompts in which one of the two rewards is constant are left out; None where none remains.
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
    """Sizes, pairs a prompt and skipped prompts of a selection; `prompts`: P texts."""
    candidates = selection.winners.shape[1]
    sizes = [
        torch.bincount(mask.sum(1), minlength=candidates + 1).tolist()
        for mask in (selection.winners, selection.losers)
    ]
    skipped = (~selection.usable).nonzero().flatten().tolist()
    pairs_ = selection.pairs[selection.usable].double()
    extent = (
        (int(pairs_.min()), float(np.median(pairs_.numpy())), int(pairs_.max()))
        if len(pairs_)
        else (0, 0.0, 0)
    )
    mean = pairs_.mean().item() if len(pairs_) else 0.0
    examples = [prompts[row] for row in skipped[:EXAMPLES]]
    return PairFigures(
        strategy_name(strategy), *sizes, extent, mean, len(skipped), examples, _lower(strategy)
    )


def _lower(strategy: Strategy) -> str | None:
    if getattr(strategy, "func", strategy) is not pairs.frs:
        return None
    return getattr(strategy, "keywords", {}).get("lower", "frontier")


def frontier_shares(scores: Tensor) -> Frontier:
    """How much of a prompt's candidates the frontiers hold: (P, N, L) raw scores."""
    upper, lower = pairs.non_dominated(scores)
    winners, losers = upper & ~lower, lower & ~upper
    shares = [mask.float().mean().item() for mask in (upper, winners, losers)]
    return Frontier(*shares, (~losers.any(1)).float().mean().item())


@functools.cache
def independent_frontier(candidates: int, rewards: int) -> Frontier:
    """`frontier_shares` of independent rewards without ties, over SIMULATED prompts drawn with a fixed seed.

    Simulated, because X+ and X- have no closed form (F+ has: A(N, L) = sum_{k <= N} A(k, L - 1) / k, A(N, 1) = 1).
    """
    return frontier_shares(
        torch.rand(SIMULATED, candidates, rewards, generator=torch.Generator().manual_seed(0))
    )


def strategy_name(strategy: Strategy) -> str:
    """`frs(lower=frontier)`: name and arguments that were given, through `functools.partial`."""
    function, given = getattr(strategy, "func", strategy), getattr(strategy, "keywords", {})
    arguments = ", ".join(f"{key}={value}" for key, value in given.items())
    return getattr(function, "__name__", type(function).__name__) + (f"({arguments})" if arguments else "")

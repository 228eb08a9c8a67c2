"""Figures of a calibration report, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """Histogram: counts of values in bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: list[int]


@dataclass(frozen=True)
class RewardFigures:
    """Figures of one reward; None: not available (no win-rates, or a label source that is not `graded`).

    Attributes:
        link: name of the reward's link function.
        scale: the reward's scale.
        declared: usual lowest and highest score according to the reward's yaml.
        seen: lowest and highest score in the pool.
        outside: share of the scores outside `declared`.
        deviation: standard deviation of the raw scores within a prompt, root mean square over prompts.
        spread: standard deviation of the calibrated rewards within a prompt, see `capo.data.spread.Spread`.
        flat: share of flat prompts, see `Spread`.
        saturated: share of saturated prompts, see `Spread`.
        median_gap: median of |link(a) - link(b)| over the pairs of candidates of a prompt.
        pair_win_rate: median win-rate of the better of two candidates of a prompt, equal to
            `sigmoid(scale * median_gap)`.
        suggested_scale: scale at which `pair_win_rate` equals TARGET; None if no scale does, since at least
            half of the pairs are ties.
        raw: histogram of the raw scores of all candidates.
        calibrated: histogram of the calibrated rewards of all candidates.
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
    """Figures of the selected pairs.

    Attributes:
        strategy: name and arguments of the pairs strategy.
        winners: `winners[k]` is the number of prompts with k candidates in X+.
        losers: `losers[k]` is the number of prompts with k candidates in X-.
        pairs: lowest, median and highest number of pairs to draw from, over the prompts that have a pair.
        mean_pairs: mean number of pairs over these prompts.
        skipped: number of prompts without a pair.
        examples: the first skipped prompts.
        lower: argument `lower` of `frs`; None for other strategies.
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
class FrontierShares:
    """Sizes of the Pareto frontiers.

    Attributes:
        undominated: mean share of a prompt's candidates in the upper frontier F+.
        winners: mean share in X+.
        losers: mean share in X-.
        empty: share of prompts in which no candidate dominates another, so that X+ and X- are empty.
    """

    undominated: float
    winners: float
    losers: float
    empty: float


@dataclass(frozen=True)
class CalibrationReport:
    """All figures of a calibration report.

    Attributes:
        prompts: number of prompts.
        candidates: number of candidates per prompt.
        method: calibration method.
        rewards: figures by reward.
        correlation: `correlation[i][j]` is the rank correlation of rewards i and j, None if undefined.
        selection: figures of the pairs.
        frontier: frontier sizes; None with one reward.
        independent: frontier sizes of the same number of independent rewards; None with one reward.
    """

    prompts: int
    candidates: int
    method: str
    rewards: dict[str, RewardFigures]
    correlation: list[list[float | None]]
    selection: PairFigures
    frontier: FrontierShares | None
    independent: FrontierShares | None

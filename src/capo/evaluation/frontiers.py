"""Frontiers: what a method reaches in several rewards over its strength, in one number and at equal levels.

A method is a setting of everything but the strength (beta, as a rule); each strength is a point, with its
win-rates against the base. Points that differ in their training seed alone are one point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from capo.evaluation.statistics import OverSeeds, bootstrap_interval, percentile_interval
from capo.win_rates import EVEN

RESAMPLES = 2000  # of prompts, for the interval of a hypervolume


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A method at one strength.

    Attributes:
        label: the strength, as it was configured.
        measured: quantity -> (S, P), one number for each of S seeds and P prompts: win-rates by reward, and
            distances.
    """

    label: str
    measured: Mapping[str, Tensor]

    def estimate(self, name: str, seed: int = 0) -> Estimate:
        """Mean over seeds and prompts; the interval is of both if there are several seeds (`OverSeeds`)."""
        values = self.measured[name]
        if min(values.shape) > 1:
            found = OverSeeds.of(values)
            return Estimate(found.mean, *found.interval)
        return Estimate(values.double().mean().item(), *bootstrap_interval(values.double().mean(0), seed))

    def mean(self, name: str) -> float:
        """Mean over seeds and prompts."""
        return self.measured[name].double().mean().item()


@dataclass(frozen=True)
class Frontier:
    """A method at several strengths.

    Attributes:
        name: what sets it apart from the other methods; empty if it is the only one.
        points: in the order of the strength.
        ordered: whether the strengths are numbers, between which values can be interpolated.
    """

    name: str
    points: Sequence[Point]
    ordered: bool = True


def hypervolume(points: np.ndarray) -> float:
    """Volume between the base and the points, as a share of the largest possible one.

    That is the volume of all win-rates that one of the points reaches or exceeds in every reward and that lie
    above the base's, 0.5, in every reward, divided by 0.5^L. A policy that wins every comparison has 1, one
    that is below the base in any reward adds nothing.

    Args:
        points: (N, L) win-rates of L rewards, in 0-1.
    """
    if len(points) == 1:
        return float(np.prod((points[0] - EVEN).clip(0) / (1 - EVEN)))
    import moocore

    reference = np.full(points.shape[1], EVEN)
    return float(moocore.hypervolume(points, ref=reference, maximise=True)) / (1 - EVEN) ** points.shape[1]


def hypervolumes(
    frontiers: Sequence[Frontier], rewards: Sequence[str], seed: int = 0
) -> list[tuple[Estimate, Estimate | None]]:
    """Return the hypervolume of each frontier, and its difference from the first one's (None for that one).

    Intervals are percentiles of a bootstrap over prompts, which are resampled for all frontiers alike, and
    over the seeds of points with several.

    Args:
        frontiers: of the same prompts.
        rewards: the rewards that are the volume's dimensions.
        seed: seed of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    prompts = next(iter(frontiers[0].points[0].measured.values())).shape[1]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) / prompts  # (B, P)
    drawn, observed = [], []
    for frontier in frontiers:
        rates = [
            torch.stack([point.measured[name] for name in rewards]).double().numpy()
            for point in frontier.points
        ]  # each (L, S, P)
        observed.append(hypervolume(np.stack([values.mean((1, 2)) for values in rates])))
        means = np.stack([_resampled(values, weights, rng) for values in rates], 1)  # (B, N, L)
        drawn.append(np.array([hypervolume(points) for points in means]))
    found: list[tuple[Estimate, Estimate | None]] = []
    for index, (mean, values) in enumerate(zip(observed, drawn, strict=True)):
        beyond = None
        if index:
            beyond = Estimate(mean - observed[0], *percentile_interval(values - drawn[0]))
        found.append((Estimate(mean, *percentile_interval(values)), beyond))
    return found


def _resampled(rates: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means (B, L) of rates (L, S, P) over B resamples of prompts and, if there are several, of seeds."""
    seeds = rates.shape[1]
    shares = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(weights)) / seeds  # (B, S)
    return np.einsum("lsp,bp,bs->bl", rates, weights, shares, optimize=True)


DRIFT_AT = "drift of latents"  # quantity of a point; no reward can be called so


@dataclass(frozen=True)
class Match:
    """Two methods compared in one quantity, `reward`, where they are equal in another, `at`.

    Attributes:
        first: name of one method.
        second: name of the other.
        at: the quantity in which both are equal.
        reward: the reward that is compared.
        overlap: range of `at` that both methods reach, (low, high); low > high if there is none.
        level: value of `at` at which they are compared; None if they cannot be.
        values: interpolated win-rates of the two.
        difference: second less first.
    """

    first: str
    second: str
    at: str
    reward: str
    overlap: tuple[float, float]
    level: float | None = None
    values: tuple[float, float] | None = None
    difference: Estimate | None = None


@dataclass(frozen=True)
class _Place:
    """A place on a frontier: `(1 - share) * before + share * after`."""

    before: Point
    after: Point
    share: float

    def per_seed(self, name: str) -> list[Tensor]:
        """The two points' (S, P) values, times their shares."""
        ends = ((self.before, 1 - self.share), (self.after, self.share))
        return [share * point.measured[name].double() for point, share in ends if share]

    def mean(self, name: str) -> float:
        """Interpolated mean over seeds and prompts."""
        return (1 - self.share) * self.before.mean(name) + self.share * self.after.mean(name)

    def slope(self, at: str, reward: str) -> float:
        """Change of `reward` for a change of `at` between the two points; 0 where they are one."""
        run = self.after.mean(at) - self.before.mean(at)
        return (self.after.mean(reward) - self.before.mean(reward)) / run if run else 0.0

    @property
    def alone(self) -> bool:
        """Whether it is a point itself, of a method that has no other."""
        return self.before is self.after


def place_at(frontier: Frontier, at: str, level: float, base: float) -> _Place | None:
    """Find the first place of a frontier, from the end nearer to the base, at which `at` has this level.

    Between neighboring points values are interpolated linearly, and never extrapolated: None if no two
    neighbors enclose the level.
    """
    path = list(frontier.points)
    if abs(path[-1].mean(at) - base) < abs(path[0].mean(at) - base):
        path.reverse()
    if len(path) == 1:
        return _Place(path[0], path[0], 0.0) if path[0].mean(at) == level else None
    for before, after in pairwise(path):
        start, stop = before.mean(at), after.mean(at)
        if min(start, stop) <= level <= max(start, stop) and start != stop:
            return _Place(before, after, (level - start) / (stop - start))
    return None


def matches(
    frontiers: Sequence[Frontier], rewards: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[Match]:
    """Compare each frontier with the first: rewards at equal drift, and one of each pair at the other."""
    points = [point for frontier in frontiers for point in frontier.points]
    drifts = all(DRIFT_AT in point.measured for point in points)
    wanted = [(DRIFT_AT, reward, 0.0) for reward in rewards if drifts]
    wanted += [(at, reward, EVEN) for at, reward in pairs]
    return [
        matched(frontiers[0], other, at, reward, base)
        for other in frontiers[1:]
        for at, reward, base in wanted
        if len(frontiers[0].points) > 1 or len(other.points) > 1
    ]


def matched(
    first: Frontier, second: Frontier, at: str, reward: str, base: float = EVEN, seed: int = 0
) -> Match:
    """Compare two methods in `reward` in the middle of the range of `at` that both reach.

    The interval counts that `at` is estimated too: to first order, prompt p adds `y_p - slope * x_p` to the
    value at a level, with the slope of `reward` over `at` between the two neighboring points. It is of seeds
    and prompts together where each point has several seeds, else over prompts.

    Args:
        first: one method, at ordered strengths.
        second: the other one, on the same prompts.
        at: quantity that is made equal: a reward, or the drift.
        reward: reward that is compared.
        base: value of `at` for the base.
        seed: seed of the bootstrap.
    """
    reached = [[point.mean(at) for point in frontier.points] for frontier in (first, second)]
    overlap = max(map(min, reached)), min(map(max, reached))
    match = Match(first.name, second.name, at, reward, overlap)
    if not (first.ordered and second.ordered):
        return match
    # without an overlap it lies between the two, where neither has a place
    level = overlap[0] if overlap[0] == overlap[1] else sum(overlap) / 2
    one, two = place_at(first, at, level, base), place_at(second, at, level, base)
    if one is None or two is None:
        return match
    values = one.mean(reward), two.mean(reward)
    terms = [*_terms(two, at, reward, 1.0), *_terms(one, at, reward, -1.0)]
    for alone, other, sign in ((one, two, 1.0), (two, one, -1.0)):
        if alone.alone and not other.alone:  # the level is where that point is, and moves with it
            slope = other.slope(at, reward)
            terms += [sign * slope * part for part in alone.per_seed(at)]
    return replace(match, level=level, values=values, difference=_spread(terms, values[1] - values[0], seed))


def _terms(place: _Place, at: str, reward: str, sign: float) -> list[Tensor]:
    """What seeds and prompts (S, P) of the points add to the interpolated value, by `matched`."""
    slope = place.slope(at, reward)
    pairs = zip(place.per_seed(reward), place.per_seed(at), strict=True)
    return [sign * (y - slope * x) for y, x in pairs]


def _spread(terms: Sequence[Tensor], mean: float, seed: int) -> Estimate:
    """Estimate of a sum of terms (S, P), whose mean is `mean` but for a constant that they leave out."""
    per_prompt = torch.stack([term.mean(0) for term in terms]).sum(0)
    if min(len(term) for term in terms) < 2:
        low, high = bootstrap_interval(per_prompt - per_prompt.mean(), seed)
        return Estimate(mean, mean + low, mean + high)
    variance = sum(term.mean(1).var().item() / len(term) for term in terms)
    half = 2 * math.sqrt(variance + per_prompt.var().item() / len(per_prompt))
    return Estimate(mean, mean - half, mean + half)

"""Simulated annotators, each with a taste, whose choices the preference reward is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from capo.shapes.scenes import COLORS, SIDE

ANNOTATORS = 12
_COOL = np.array([name in ("green", "cyan", "blue", "purple") for name in COLORS])


@dataclass(frozen=True)
class Taste:
    """Weights of an annotator, in log-odds of choosing a picture, for one unit of each quality."""

    faithful: float  # all assertions of the prompt against none
    exact: float  # the last assertion, beyond its share
    looks: float  # a point of the rating rule
    large: float  # four pixels of mean radius
    centered: float  # objects around the center against at an edge
    cool: float  # green, cyan, blue or purple against warm
    plain: float  # no texture


def tastes(seed: int) -> list[Taste]:
    """Draw ANNOTATORS tastes around a common mean.

    The mean prefers faithful, good-looking, large, centered and, against the rating rule, cool-colored
    pictures.
    """
    rng = np.random.default_rng([seed, 7])
    center = np.array([5.0, 0.8, 0.8, 0.5, 0.6, 0.8, 0.2])
    spread = np.array([2.0, 0.4, 0.3, 0.4, 0.5, 0.7, 0.4])
    return [Taste(*map(float, center + spread * rng.normal(size=7))) for _ in range(ANNOTATORS)]


def qualities(things: np.ndarray) -> np.ndarray:
    """Return how large, centered, cool and plain pictures are, (..., 4); 0 for a picture without objects.

    `things` (..., n, 6) are the objects as `lineups.recorded` encodes them.
    """
    there = np.asarray(things[..., 0] >= 0)
    count = np.maximum(there.sum(-1), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return (values * there).sum(-1) / count

    off = np.hypot(mean(things[..., 0]) - SIDE / 2, mean(things[..., 1]) - SIDE / 2)
    cool = _COOL[np.maximum(things[..., 4], 0).astype(int)]
    found = [mean(things[..., 2]) / 4, 1 - off / (SIDE / 2), mean(cool), mean(things[..., 5] == 0)]
    return np.stack(found, axis=-1) * np.expand_dims(there.any(-1), -1)


def worths(taste: Taste, share: np.ndarray, ratings: np.ndarray, things: np.ndarray) -> np.ndarray:
    """Return the worth (...,) of pictures to an annotator, in log-odds.

    Args:
        taste: the annotator's.
        share: (...,) share of the prompt's assertions that hold.
        ratings: (...,) by the rating rule.
        things: (..., n, 6) objects, as `lineups.recorded` encodes them.
    """
    own = qualities(things) @ np.array([taste.large, taste.centered, taste.cool, taste.plain])
    return taste.faithful * share + taste.exact * (share == 1) + taste.looks * ratings + own


def majority(share: np.ndarray, ratings: np.ndarray, things: np.ndarray, seed: int) -> np.ndarray:
    """Return the share (P,) of annotators that prefer the first picture of each pair, without choice noise.

    `share` and `ratings` are (P, 2), `things` (P, 2, n, 6), as in `worths`.
    """
    votes = [np.diff(worths(taste, share, ratings, things), axis=-1)[..., 0] < 0 for taste in tastes(seed)]
    return np.mean(votes, axis=0)

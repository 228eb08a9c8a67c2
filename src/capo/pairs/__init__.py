"""Pair selection: scores and calibrated rewards -> candidates that may win or lose (CaPO, section 4.3)."""

from capo.pairs.fronts import frontiers, fronts
from capo.pairs.strategies import (
    Declaration,
    PairSets,
    Strategy,
    argument,
    best_worst,
    combined_rewards,
    declaration,
    declares,
    frs,
    random_pair,
    reward_sum,
)

__all__ = [
    "Declaration",
    "PairSets",
    "Strategy",
    "argument",
    "best_worst",
    "combined_rewards",
    "declaration",
    "declares",
    "frontiers",
    "fronts",
    "frs",
    "random_pair",
    "reward_sum",
]

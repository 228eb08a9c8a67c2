"""Pairs of many rewards: share of the prompts with a pair, sizes of the sets and mean dR, by pairs.depth.

    python -m benchmarks.many_rewards [--prompts 4000] [--candidates 16]

Scores are normal, with equal correlations between all rewards. The script prints Markdown tables. Cells are
`share of the prompts with a pair, mean size of X+, mean dR of a pair that is drawn`.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from benchmarks.options import add_numbers
from capo.calibration import calibrate
from capo.data.selection import Selection, pair_matrix, select
from capo.pairs import Strategy, frs, random_pair, reward_sum

REWARDS = (2, 3, 4, 6, 8, 10, 12)
STRATEGIES: dict[str, Strategy] = {
    "depth=null": frs,
    "depth=2": partial(frs, depth=2),
    "depth=4": partial(frs, depth=4),
    "pairs=sum": reward_sum,
    "pairs=random": random_pair,
}


def make_scores(prompts: int, candidates: int, rewards: int, correlation: float) -> Tensor:
    """Normal scores (P, N, L) of unit variance with this correlation between any two rewards."""
    draw = torch.Generator().manual_seed(rewards)
    common = torch.randn(prompts, candidates, 1, generator=draw)
    own = torch.randn(prompts, candidates, rewards, generator=draw)
    return correlation**0.5 * common + (1 - correlation) ** 0.5 * own


def mean_gap(selection: Selection) -> float:
    """Mean dR of the pair of a visit, over the prompts that have one."""
    use = selection.usable
    winners, losers, rewards = selection.winners[use], selection.losers[use], selection.rewards[use]
    allowed = pair_matrix(winners, losers, rewards)
    gaps = (rewards[:, :, None] - rewards[:, None, :]) * allowed
    return (gaps.sum((1, 2)) / allowed.sum((1, 2))).mean().item()


def main() -> None:
    """Print one table for independent rewards and one for a correlation of 0.5."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add_numbers(parser, {"prompts": 4000, "candidates": 16})
    args = parser.parse_args()
    for correlation in (0.0, 0.5):
        print(f"\ncorrelation {correlation:g}\n\n| rewards | {' | '.join(STRATEGIES)} |")
        print("|---" * (1 + len(STRATEGIES)) + "|")
        for rewards in REWARDS:
            scores = make_scores(args.prompts, args.candidates, rewards, correlation)
            calibrated = calibrate(scores, ["identity"] * rewards, [1.0] * rewards)
            cells = []
            for strategy in STRATEGIES.values():
                found = select(strategy, scores, calibrated)
                told = found.statistics()
                cells.append(f"{1 - told.skipped_share:.1%}, {told.winners:.1f}, {mean_gap(found):.3f}")
            print(f"| {rewards} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Seconds from the raw scores of a pool to pairs: calibration, frontiers, pair sets and their counts.

    python -m benchmarks.selection [--prompts 100000] [--candidates 16] [--rewards 3] [--threads 2] [--runs 7]

Scores are random and independent; the rewards have the links `identity` and `log` in turn. The script prints
medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.options import add_numbers
from capo.calibration import METHODS, calibrate
from capo.data.selection import select
from capo.pairs import best_worst, frs, random_pair, reward_sum


def make_scores(prompts: int, candidates: int, rewards: int) -> tuple[torch.Tensor, list[str]]:
    """Random scores (P, N, L), every second reward a probability, and the matching links."""
    scores = torch.randn(prompts, candidates, rewards, generator=torch.Generator().manual_seed(0))
    links = ["log" if reward % 2 else "identity" for reward in range(rewards)]
    for reward in range(1, rewards, 2):
        scores[..., reward].sigmoid_()
    return scores, links


def median_seconds(job, runs: int) -> float:
    """Median wall-clock seconds of `runs` calls, after one for warm-up."""
    job()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Print the figures that the command line asks for."""
    defaults = {"prompts": 100_000, "candidates": 16, "rewards": 3, "threads": 2, "runs": 7}
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add_numbers(parser, defaults)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scores, links = make_scores(args.prompts, args.candidates, args.rewards)
    scales = [1.0] * args.rewards
    calibrated = calibrate(scores, links, scales)
    strategies = {
        "sum": reward_sum,
        "frs": frs,
        "frs lower=all_dominated": partial(frs, lower="all_dominated"),
        "random": random_pair,
        **({"best_worst": best_worst} if args.rewards == 1 else {}),
    }
    jobs: dict[str, Callable[[], object]] = {
        f"calibration={name}": partial(calibrate, scores, links, scales, name) for name in METHODS
    }
    jobs |= {
        f"pairs={name}": partial(select, strategy, scores, calibrated)
        for name, strategy in strategies.items()
    }
    jobs["in all: win_rate, frs"] = lambda: select(frs, scores, calibrate(scores, links, scales))
    sizes = f"{args.prompts} prompts x {args.candidates} candidates x {args.rewards} rewards"
    print(f"{sizes}, {args.threads} threads, median of {args.runs} runs")
    for name, job in jobs.items():
        print(f"{name:<32} {median_seconds(job, args.runs):.3f} s", flush=True)


if __name__ == "__main__":
    main()

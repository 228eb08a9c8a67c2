"""The shapes world as a benchmark: its test prompts by category, judged by the oracle."""

from __future__ import annotations

from capo.evaluation.benchmarks import Benchmark
from capo.evaluation.benchmarks.layout import numbered
from capo.evaluation.categories import groups_of
from capo.shapes.prompts import prompt_sets


def shapes(prompts: int = 256, seed: int = 0, images: int = 4) -> Benchmark:
    """The first `prompts` test prompts of `seed`, which no training and no validation has.

    Raises InputError for more prompts than the grammar has.
    """
    drawn = prompt_sets(1, 1, prompts, seed)["test"]
    return Benchmark(
        "shapes",
        drawn,
        images,
        numbered(len(drawn), images),
        groups=groups_of([prompt.category for prompt in drawn]),
    )

"""Figures of a benchmark: means by group with intervals over prompts, and tests against a reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from capo.evaluation.benchmarks.layout import OVERALL, Benchmark
from capo.evaluation.results import DIGITS
from capo.evaluation.statistics import balanced_interval, bootstrap_interval, paired_tests, prompts_needed
from capo.evaluation.tables import SIGNIFICANT
from capo.win_rates import win_rate


@dataclass(frozen=True)
class Row:
    """One model in a benchmark's table.

    Attributes:
        name: what the table calls it.
        values: measure -> (P,), one figure for each prompt of the list.
        scores: measure -> (P, K), of measures that were computed here, raw scores of the images.
    """

    name: str
    values: Mapping[str, Tensor]
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_scores(cls, name: str, benchmark: Benchmark, scores: Mapping[str, Tensor]) -> Row:
        """From raw scores of the drawn prompts, measure -> (`benchmark.drawn`, K)."""
        listed = {measure: raw.double()[benchmark.places] for measure, raw in scores.items()}
        values = {
            measure: benchmark.factors.get(measure, 1.0) * raw.mean(1) for measure, raw in listed.items()
        }
        return cls(name, values, listed)


def summary(benchmark: Benchmark, rows: Sequence[Row], seed: int) -> dict:
    """Figures of all rows as JSON values; the last of several rows is the reference of the others.

    Args:
        benchmark: groups, and how the overall figure is made.
        rows: the models.
        seed: seed of intervals and tests.

    Returns:
        {"benchmark", "prompts", "images_per_prompt", "overall", "rows", "measures"}. `measures` has for each
        measure and part (`Benchmark.parts_of`): "prompts", their number; "rows", a mean with its interval
        "low" to "high" for each row (and "spread" where the official figure has one); "differences" from the
        reference for each other row, with interval, "p" and "holm", over the measures of the overall figure
        or over the groups of one measure, and `prompts_needed`; for measures that were computed here
        "win_rates" against the reference; and "best", the row whose mean is above all others beyond chance,
        or null.
    """
    measures = list(dict.fromkeys(measure for row in rows for measure in row.values))
    found = {
        measure: {
            part: _figures(benchmark, rows, measure, part, seed) for part in benchmark.parts_of(measure)
        }
        for measure in measures
    }
    for row in rows[:-1]:
        _test(benchmark, row, rows[-1], found, seed)
    _mark_best(benchmark, rows, found, seed)
    return {
        "benchmark": benchmark.name,
        "prompts": len(benchmark.prompts),
        "images_per_prompt": benchmark.images,
        "overall": benchmark.overall,
        "rows": [row.name for row in rows],
        "measures": found,
    }


def _figures(benchmark: Benchmark, rows: Sequence[Row], measure: str, part: str, seed: int) -> dict:
    """Figures of one measure and part, without the tests."""
    here, reference = [row for row in rows if measure in row.values], rows[-1]
    count = len(benchmark.parts[part])
    means = {row.name: _mean(benchmark, row.values[measure], part, seed) for row in here}
    if benchmark.chunk and part != OVERALL and count % benchmark.chunk == 0:
        for row in here:
            parts = _weighted(benchmark, row.values[measure], part).view(-1, benchmark.chunk).mean(1)
            means[row.name]["spread"] = round(parts.std(correction=0).item(), DIGITS)
    entry: dict = {"prompts": count, "rows": means, "best": None, "differences": {}}
    rated = [row for row in rows[:-1] if measure in row.scores and measure in reference.scores]
    if rated:
        theirs = reference.scores[measure]
        rates = {row.name: win_rate(row.scores[measure], theirs) for row in rated}
        entry["win_rates"] = {name: _mean(benchmark, rate, part, seed) for name, rate in rates.items()}
    return entry


def _test(benchmark: Benchmark, row: Row, reference: Row, found: dict, seed: int) -> None:
    """Add the differences of `row` from the reference to the figures `found`, with their tests."""
    apart = {
        measure: values - reference.values[measure]
        for measure, values in row.values.items()
        if measure in reference.values
    }
    overall = {
        measure: _weighted(benchmark, values, OVERALL)
        for measure, values in apart.items()
        if OVERALL in found[measure]
    }
    whole = paired_tests(overall, seed)
    for measure, values in apart.items():
        groups = [part for part in found[measure] if part != OVERALL]
        tests = paired_tests({name: _weighted(benchmark, values, name) for name in groups}, seed)
        if measure in whole:
            tests[OVERALL] = whole[measure]
        for part, test in tests.items():
            found[measure][part]["differences"][row.name] = {
                **_mean(benchmark, values, part, seed),
                **{key: round(p, DIGITS) for key, p in test.items()},
                "prompts_needed": prompts_needed(_weighted(benchmark, values, part)),
            }


def _mark_best(benchmark: Benchmark, rows: Sequence[Row], found: dict, seed: int) -> None:
    """Name the row that is above every other beyond chance, for each measure and part.

    Holm's p-values count the tests of the overall figures of all measures together, and those of the groups
    of each measure.
    """
    families = [[(measure, OVERALL) for measure, parts in found.items() if OVERALL in parts]]
    families += [[(measure, part) for part in parts if part != OVERALL] for measure, parts in found.items()]
    for family in families:
        leads: dict[tuple[str, str], str] = {}
        tests: dict[str, Tensor] = {}
        for measure, part in family:
            values = {
                row.name: _weighted(benchmark, row.values[measure], part)
                for row in rows
                if measure in row.values
            }
            lead = max(values, key=lambda name, values=values: float(values[name].mean()))
            leads[measure, part] = lead
            tests |= {
                json.dumps([measure, part, name]): values[lead] - other
                for name, other in values.items()
                if name != lead
            }
        largest: dict[tuple[str, str], float] = {}
        for name, test in paired_tests(tests, seed).items():
            measure, part, _ = json.loads(name)
            largest[measure, part] = max(largest.get((measure, part), 0.0), test["holm"])
        for (measure, part), p in largest.items():
            if p < SIGNIFICANT:
                found[measure][part]["best"] = leads[measure, part]


def _mean(benchmark: Benchmark, values: Tensor, part: str, seed: int) -> dict[str, float]:
    """Mean of a part with its interval over prompts."""
    if part == OVERALL and benchmark.overall == "groups":
        groups = [values[list(numbers)].double() for numbers in benchmark.groups.values()]
        low, high = balanced_interval(groups, seed)
    else:
        low, high = bootstrap_interval(_weighted(benchmark, values, part), seed)
    mean = _weighted(benchmark, values, part).mean().item()
    return {name: round(value, DIGITS) for name, value in {"mean": mean, "low": low, "high": high}.items()}


def _weighted(benchmark: Benchmark, values: Tensor, part: str) -> Tensor:
    """Values of a part's prompts, whose mean is its figure: of a mean over groups, weighted by group."""
    if part != OVERALL or benchmark.overall != "groups":
        return values[list(benchmark.parts[part])].double()
    held = [list(numbers) for numbers in benchmark.groups.values()]
    total = sum(map(len, held))
    return torch.cat([values[numbers].double() * total / (len(held) * len(numbers)) for numbers in held])

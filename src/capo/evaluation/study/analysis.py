"""What the votes of a study say: win-rates with intervals, by rater and by prompt, and agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from capo.errors import InputError
from capo.evaluation.results import DIGITS
from capo.evaluation.statistics import bootstrap_interval, crossed_interval, paired_tests, prompts_needed
from capo.evaluation.study.store import FIRST, SECOND, TIE, Pair, Study, Vote

WORTH = {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}


@dataclass(frozen=True)
class Ballot:
    """Votes that count.

    Attributes:
        raters: names of R raters.
        pairs: the P pairs on which at least one of them has voted, without checks.
        worth: (R, P) 1 for the first side, 0.5 for a tie, 0 for the second side; NaN where there is no vote.
    """

    raters: Sequence[str]
    pairs: Sequence[Pair]
    worth: np.ndarray


def checked(study: Study, votes: Sequence[Vote]) -> dict[str, dict[str, int]]:
    """By rater: how many checks were answered, and how many failed: a tie fails, as the damaged image."""
    found: dict[str, dict[str, int]] = {vote.rater: {"checks": 0, "failed": 0} for vote in votes}
    for vote in votes:
        if study.pairs[vote.pair].check:
            found[vote.rater]["checks"] += 1
            found[vote.rater]["failed"] += vote.choice != FIRST
    return found


def ballot(study: Study, votes: Sequence[Vote], raters: Sequence[str]) -> Ballot:
    """Arrange the votes of these raters on pairs that are no checks."""
    cells = {(vote.rater, vote.pair): WORTH[vote.choice] for vote in votes if vote.rater in raters}
    seen = {pair for _, pair in cells}
    pairs = [pair for pair in study.pairs.values() if not pair.check and pair.name in seen]
    kept = [rater for rater in raters if any((rater, pair.name) in cells for pair in pairs)]
    worth = [[cells.get((rater, pair.name), math.nan) for pair in pairs] for rater in kept]
    return Ballot(kept, pairs, np.array(worth).reshape(len(kept), len(pairs)))


def agreement(worth: np.ndarray) -> float | None:
    """Krippendorff's alpha for nominal data (first, second, tie): 1 for agreement, 0 for that of chance.

    Args:
        worth: (R, P) choices of raters on pairs, NaN where there is none.

    Returns:
        None where it is not defined: no pair has two votes, or all votes on such pairs are the same.

    Raises:
        InputError: the package krippendorff is not installed.
    """
    shared = worth[:, (~np.isnan(worth)).sum(0) > 1]
    if len(set(shared[~np.isnan(shared)].tolist())) < 2:
        return None
    try:
        import krippendorff
    except ImportError as error:
        raise InputError(
            "agreement between raters needs the package krippendorff: pip install -e '.[study]'"
        ) from error
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement="nominal"))


def study_results(study: Study, failures: int) -> dict:
    """Compute what a study found, as JSON values; equal votes give equal results.

    Args:
        study: the study.
        failures: number of checks that a rater may fail; votes of those who failed more do not count.

    Returns:
        `win_rate` of the first side in 0-1, mean over prompts of the mean over raters, a tie counting one
        half: `mean`; `low`, `high` over prompts; `crossed_low`, `crossed_high` over raters and prompts
        (`crossed_interval`); `p` of a paired test over prompts; `prompts_needed`. Besides `alpha`
        (`agreement`), `votes`, `pairs`, the shares `ties` and `left` (of votes that are no ties, on the image
        that stood on the left), `raters` and `prompts` (lists), and the study's names.

    Raises:
        InputError: no vote counts, or krippendorff is not installed and two raters share a pair.
    """
    votes = study.votes()
    checks = checked(study, votes)
    kept = [rater for rater, found in checks.items() if found["failed"] <= failures]
    counted = ballot(study, votes, kept)
    if not counted.pairs:
        raise InputError(
            f"{study.folder}: no vote counts ({len(votes)} votes, {len(checks) - len(kept)} of {len(checks)} "
            f"raters failed more than {failures} checks); collect votes first"
        )
    seed, given = study.facts.seed, _counted(study, votes, kept)
    decided = [vote for vote in given if vote.choice != TIE]
    left = sum(vote.choice == vote.left for vote in decided)
    per_prompt = torch.from_numpy(np.nanmean(counted.worth, 0))
    alpha = agreement(counted.worth)
    return {
        "names": list(study.facts.names),
        "win_rate": _rate(per_prompt, seed)
        | _rounded(
            dict(zip(("crossed_low", "crossed_high"), crossed_interval(counted.worth, seed), strict=True))
        )
        | _rounded(paired_tests({"": per_prompt - 0.5}, seed)[""], "p")
        | {"prompts_needed": prompts_needed(per_prompt - 0.5)},
        "alpha": None if alpha is None else round(alpha, DIGITS),
        "votes": len(given),
        "pairs": len(counted.pairs),
        "of_pairs": sum(not pair.check for pair in study.pairs.values()),
        "ties": round(1 - len(decided) / len(given), DIGITS),
        "left": round(left / len(decided), DIGITS) if decided else None,
        "failures": failures,
        "raters": _raters(study, votes, checks, kept),
        "prompts": _prompts(counted, per_prompt),
        "first": study.facts.first,
        "second": study.facts.second,
    }


def _counted(study: Study, votes: Sequence[Vote], raters: Sequence[str]) -> list[Vote]:
    return [vote for vote in votes if vote.rater in raters and not study.pairs[vote.pair].check]


def _raters(
    study: Study, votes: Sequence[Vote], checks: Mapping[str, Mapping[str, int]], kept: Sequence[str]
) -> list[dict]:
    """One row for each rater, counted or not: votes, win-rate with interval, checks, seconds."""
    rows = []
    for rater, found in checks.items():
        own = _counted(study, votes, [rater])
        rates = torch.tensor([WORTH[vote.choice] for vote in own], dtype=torch.float64)
        seconds = [vote.seconds for vote in own if vote.seconds is not None]
        rows.append(
            {
                "rater": rater,
                "votes": len(own),
                **(_rate(rates, study.facts.seed) if own else {"mean": None, "low": None, "high": None}),
                **found,
                "counts": rater in kept,
                "median_seconds": round(median(seconds), 1) if seconds else None,
            }
        )
    return rows


def _prompts(counted: Ballot, per_prompt: torch.Tensor) -> list[dict]:
    """One row for each pair that has votes: its prompt, the number of votes, and its win-rate."""
    return [
        {
            "pair": pair.name,
            "prompt_id": pair.prompt_id,
            "prompt": pair.prompt,
            "category": pair.category,
            "votes": int((~np.isnan(counted.worth[:, place])).sum()),
            "win_rate": round(float(per_prompt[place]), DIGITS),
        }
        for place, pair in enumerate(counted.pairs)
    ]


def _rate(values: torch.Tensor, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, seed)
    return _rounded({"mean": float(values.mean()), "low": low, "high": high})


def _rounded(values: Mapping[str, float], *only: str) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in values.items() if not only or name in only}

"""Turn the figures of a calibration report into warnings and advice (pure functions)."""

from __future__ import annotations

import math

from capo.data.spread import Spread, spread_warnings
from capo.evaluation.reports.calibration_figures import CalibrationReport, FrontierShares, RewardFigures
from capo.evaluation.reports.calibration_report import TARGET

OUTSIDE = 0.5  # warn if a larger share of scores lies outside the declared range
CROWDED = 0.5  # warn if a larger share of the candidates is in the upper frontier
EMPTY = 0.1  # warn if a larger share of prompts has an empty X-


def warnings_of(report: CalibrationReport) -> list[str]:
    """Warnings about training on these pairs: for each reward in order, then for the pairs; may be empty."""
    rewards = [told for name, figures in report.rewards.items() for told in reward_warnings(name, figures)]
    return [*rewards, *pair_warnings(report)]


def reward_warnings(name: str, figures: RewardFigures) -> list[str]:
    """Warn if a reward is flat or saturated, with a scale that corrects it, or leaves its declared range."""
    shares = [math.nan if share is None else share for share in (figures.flat, figures.saturated)]
    found = [
        f"{told}. {scale_advice(name, figures)}"
        for told in spread_warnings([Spread(figures.spread, *shares)], [name])
    ]
    if figures.declared and figures.outside is not None and figures.outside > OUTSIDE:
        found.append(
            f"reward '{name}': {figures.outside:.0%} of its scores lie outside {figures.declared[0]:g} to "
            f"{figures.declared[1]:g}, its declared range (seen: {figures.seen[0]:.4g} to "
            f"{figures.seen[1]:.4g}): are these the weights that its yaml describes, or is a factor "
            "missing?"
        )
    return found


def scale_advice(name: str, figures: RewardFigures) -> str:
    """Name the override that gives the median pair win-rate TARGET, or say that no scale does."""
    if figures.suggested_scale is None:
        return "No scale helps: in at least half of the pairs both candidates have the same score"
    return (
        f"{override(name, figures.suggested_scale)} gives the better of two candidates a median win-rate of "
        f"{TARGET:g} (now {figures.pair_win_rate:.3f})"
    )


def override(name: str, scale: float) -> str:
    """Command-line override `rewards.NAME.scale=...`, with three significant digits."""
    return f"rewards.{name}.scale={float(f'{scale:.3g}'):.12g}"


def pair_warnings(report: CalibrationReport) -> list[str]:
    """Warn of skipped prompts and, if pairs are selected from frontiers, of degenerate frontiers."""
    selected, frontier, found = report.selection, report.frontier, []
    if selected.skipped:
        share = selected.skipped / report.prompts
        found.append(
            f"{selected.skipped} of {report.prompts} prompts ({share:.0%}) have no pair with dR > 0 "
            "and are skipped"
        )
    if (
        frontier
        and report.independent
        and selected.lower
        and (frontier.undominated > CROWDED or frontier.empty > EMPTY)
    ):
        found.append(_degenerate(report, frontier, report.independent))
    return found


def _degenerate(report: CalibrationReport, frontier: FrontierShares, independent: FrontierShares) -> str:
    wider = (
        "; pairs.lower=all_dominated draws losers from more candidates, "
        "but gives no pair to a prompt that has none"
    )
    deeper = "; pairs.depth=4 takes winners and losers from the next fronts, too, at a smaller dR"
    return (
        f"the frontier of {len(report.rewards)} rewards has degenerated: {frontier.undominated:.0%} of the "
        f"candidates are dominated by no other (independent rewards: {independent.undominated:.0%}), and X- "
        f"is empty in {frontier.empty:.0%} of the prompts (independent rewards: {independent.empty:.0%}). "
        "Use fewer rewards, more candidates (pool.candidates) or pairs=sum"
        + (deeper if report.selection.lower == "frontier" and report.selection.skipped else "")
        + (wider if report.selection.lower == "frontier" else "")
    )

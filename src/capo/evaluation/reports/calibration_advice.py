"""What the figures of a calibration report call for, in sentences (pure)."""

from __future__ import annotations

import math

from capo.calibration import Spread, spread_warnings
from capo.evaluation.reports.calibration_report import TARGET, CalibrationReport, RewardFigures

OUTSIDE = 0.5  # share of scores outside of the declared range that is warned of
CROWDED = 0.5  # share of the candidates in the upper frontier that is warned of
EMPTY = 0.1  # share of prompts without a lower frontier that is warned of


def warnings_of(report: CalibrationReport) -> list[str]:
    """What a user should know before training on these pairs: rewards in their order, then pairs; empty where all is well."""
    rewards = [told for name, figures in report.rewards.items() for told in reward_warnings(name, figures)]
    return [*rewards, *pair_warnings(report)]


def reward_warnings(name: str, figures: RewardFigures) -> list[str]:
    """A sentence where a reward is flat or saturated, with the scale that would mend it, and where it leaves its declared range."""
    shares = [math.nan if share is None else share for share in (figures.flat, figures.saturated)]
    found = [
        f"{told}. {scale_advice(name, figures)}"
        for told in spread_warnings([Spread(figures.spread, *shares)], [name])
    ]
    if figures.outside is not None and figures.outside > OUTSIDE:
        found.append(
            f"reward '{name}': {figures.outside:.0%} of its scores lie outside of {figures.declared[0]:g} to {figures.declared[1]:g}, "
            f"its declared range (seen: {figures.seen[0]:.4g} to {figures.seen[1]:.4g}): other weights, or a factor that is missing?"
        )
    return found


def scale_advice(name: str, figures: RewardFigures) -> str:
    """The override that gives the median pair a win-rate of TARGET, or that there is none."""
    if figures.suggested_scale is None:
        return "No scale helps: in half of the pairs or more both candidates score the same"
    return (
        f"{override(name, figures.suggested_scale)} gives the better of two candidates a median win-rate of {TARGET:g} "
        f"(now {figures.pair_win_rate:.3f})"
    )


def override(name: str, scale: float) -> str:
    """`rewards.NAME.scale=...` with three digits that count, as the command line takes it."""
    return f"rewards.{name}.scale={float(f'{scale:.3g}'):.12g}"


def pair_warnings(report: CalibrationReport) -> list[str]:
    """Sentences on prompts that are skipped and, where pairs come from frontiers, on ones that have degenerated."""
    selected, frontier, found = report.selection, report.frontier, []
    if selected.skipped:
        share = selected.skipped / report.prompts
        found.append(
            f"{selected.skipped} of {report.prompts} prompts ({share:.0%}) have no pair with dR > 0 and are skipped"
        )
    if frontier and selected.lower and (frontier.undominated > CROWDED or frontier.empty > EMPTY):
        found.append(_degenerate(report))
    return found


def _degenerate(report: CalibrationReport) -> str:
    frontier, independent = report.frontier, report.independent
    wider = (
        "; pairs.lower=all_dominated draws from more candidates, but gives no pair to a prompt that has none"
    )
    return (
        f"the frontier of {len(report.rewards)} rewards has degenerated: {frontier.undominated:.0%} of the candidates are dominated by "
        f"none (independent rewards: {independent.undominated:.0%}), and in {frontier.empty:.0%} of the prompts X- is empty "
        f"({independent.empty:.0%}). Take fewer rewards, more candidates (pool.candidates) or pairs=sum"
        + (wider if report.selection.lower == "frontier" else "")
    )

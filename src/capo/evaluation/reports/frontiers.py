"""Show frontiers: rewards against each other over the strength, hypervolumes, methods at equal strength."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Column, Table

from capo.evaluation.frontiers import Estimate, Frontier, Match, hypervolumes, matches
from capo.evaluation.reports.formats import verdict
from capo.evaluation.reports.pictures import png_of
from capo.runtime.files import write_table, write_whole

PANELS = 3  # maximum number of pairs of rewards that are drawn
PICTURE, MATCHES = "frontier.png", "matched.csv"
VOLUME = "frontier/hypervolume"  # column of tables of runs, with /low and /high
COLORS = (
    "#2563a8",
    "#cf5f27",
    "#2a8a5a",
    "#8b5bb5",
    "#a9842a",
    "#c2477f",
    "#3b8794",
    "#7a5c48",
    "#5a6170",
    "#98a22e",
)


@dataclass(frozen=True)
class MethodComparison:
    """Methods with their hypervolumes, and compared at equal strength.

    Attributes:
        axis: what the strength is; None: each method is one point.
        frontiers: the methods.
        rewards: the rewards of the volumes.
        methods: directory of each run -> name of its method.
        notes: runs that are left out, and why.
        volumes: hypervolume of each method, and its difference from the first one's.
        matches: comparisons of the methods with the first one.
    """

    axis: str | None
    frontiers: Sequence[Frontier]
    rewards: Sequence[str]
    methods: Mapping[Path, str]
    notes: Sequence[str] = ()
    volumes: Sequence[tuple[Estimate, Estimate | None]] = field(default_factory=list)
    matches: Sequence[Match] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        axis: str | None,
        frontiers: Sequence[Frontier],
        rewards: Sequence[str],
        methods: Mapping[Path, str],
        notes: Sequence[str] = (),
    ) -> MethodComparison:
        """Compute the hypervolumes and comparisons."""
        volumes = hypervolumes(frontiers, rewards)
        return cls(
            axis,
            frontiers,
            rewards,
            methods,
            notes,
            volumes,
            matches(frontiers, rewards, drawn_pairs(rewards)),
        )

    def columns(self, run: Path) -> dict[str, float]:
        """Columns of a run in a table: the hypervolume of its method, with its interval."""
        for frontier, (volume, _) in zip(self.frontiers, self.volumes, strict=True):
            if self.methods.get(run) == frontier.name:
                figures = {VOLUME: volume.mean, f"{VOLUME}/low": volume.low, f"{VOLUME}/high": volume.high}
                return {name: round(value, 6) for name, value in figures.items()}
        return {}

    def panels(self) -> list[str]:
        """PNG pictures of the pairs of rewards, in base64."""
        return [base64.b64encode(self.picture([pair])).decode() for pair in drawn_pairs(self.rewards)]

    def picture(self, pairs: Sequence[tuple[str, str]] | None = None) -> bytes:
        """Draw pairs of rewards, by default all of them, against each other as PNG bytes, one panel each."""
        pairs = drawn_pairs(self.rewards) if pairs is None else pairs
        figure = Figure(figsize=(5 * len(pairs) + 0.5, 5.2), layout="constrained")
        for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
            self._draw(axes, *pair)
        return png_of(figure)

    def _draw(self, axes: Axes, first: str, second: str) -> None:
        """Draw a line for each method, with intervals and the strengths."""
        for number, frontier in enumerate(self.frontiers):
            at = [[point.estimate(name) for point in frontier.points] for name in (first, second)]
            xs, ys = ([100 * estimate.mean for estimate in estimates] for estimates in at)
            axes.errorbar(
                xs,
                ys,
                xerr=_errors(at[0]),
                yerr=_errors(at[1]),
                fmt="-o" if frontier.ordered else "o",
                markersize=4,
                elinewidth=0.6,
                color=COLORS[number % len(COLORS)],
                label=frontier.name or None,
            )
            for x, y, point in zip(xs, ys, frontier.points, strict=True):
                axes.annotate(point.label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.axhline(50, color="#8d94a1", linewidth=1, linestyle="--")
        axes.axvline(50, color="#8d94a1", linewidth=1, linestyle="--")
        axes.set_xlabel(f"{first}: win-rate against the base, %")
        axes.set_ylabel(f"{second}: win-rate, %")
        title = f"points: {self.axis}" if self.axis else None
        if any(frontier.name for frontier in self.frontiers):
            axes.legend(frameon=False, title=title, fontsize=8, title_fontsize=8)
        elif title:
            axes.set_title(title, fontsize=9, loc="left")

    def volume_rows(self) -> list[dict[str, str]]:
        """A row for each method: name, number of points, hypervolume and difference from the first, in %."""
        rows = []
        for frontier, (volume, beyond) in zip(self.frontiers, self.volumes, strict=True):
            rows.append(
                {
                    "name": frontier.name or "all",
                    "points": str(len(frontier.points)),
                    "volume": f"{100 * volume.mean:.2f}",
                    "span": f"{100 * volume.low:.2f}–{100 * volume.high:.2f}",
                    "beyond": "" if beyond is None else f"{100 * beyond.mean:+.2f}",
                    "beyond_span": "" if beyond is None else _signed_span(beyond, 2),
                    "verdict": "" if beyond is None else verdict(vars(beyond), 0.0),
                }
            )
        return rows

    def match_rows(self) -> list[dict[str, str]]:
        """A row for each comparison at equal strength; without figures where the ranges do not overlap."""
        return [_match_row(match) for match in self.matches]

    def tables(self) -> list[Table]:
        """Tables for the console."""
        names = ", ".join(self.rewards)
        volumes = Table(
            Column("method", overflow="fold"),
            "points",
            "hypervolume %",
            "95 % interval",
            "beyond the first",
            title=f"hypervolume of {names} above the base, % of the largest",
            box=box.SIMPLE_HEAD,
        )
        for row in self.volume_rows():
            beyond = f"{row['beyond']} ({row['beyond_span']})" if row["beyond"] else ""
            volumes.add_row(row["name"], row["points"], row["volume"], row["span"], beyond)
        if not self.matches:
            return [volumes]
        title = f"at equal strength, against {self.frontiers[0].name}: win-rates and difference, %"
        compared = Table(
            Column("method", overflow="fold"), "equal", "reward", "first", "this", "difference", title=title
        )
        compared.box = box.SIMPLE_HEAD
        for row in self.match_rows():
            shown = [f"{row['difference']} ({row['span']})"] if row["difference"] else [row["why"]]
            compared.add_row(row["name"], row["equal"], row["reward"], row["first"], row["second"], *shown)
        return [volumes, compared]

    def write(self, folder: Path, picture: str = PICTURE) -> list[Path]:
        """Write the picture and, of two methods or more, the comparisons to `folder`; return the paths."""
        write_whole(folder / picture, self.picture())
        if not self.matches:
            return [folder / picture]
        rows = [_match_figures(match) for match in self.matches]
        write_table(folder / MATCHES, list(rows[0]), rows)
        return [folder / picture, folder / MATCHES]


def drawn_pairs(rewards: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of rewards that are drawn, in the rewards' order."""
    return list(itertools.combinations(rewards, 2))[:PANELS]


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    return [
        [100 * (estimate.mean - estimate.low) for estimate in estimates],
        [100 * (estimate.high - estimate.mean) for estimate in estimates],
    ]


def _signed_span(estimate: Estimate, digits: int) -> str:
    return f"{100 * estimate.low:+.{digits}f} to {100 * estimate.high:+.{digits}f}"


def _match_row(match: Match) -> dict[str, str]:
    row = {"name": match.second, "reward": match.reward, "equal": match.at}
    if match.level is None or match.values is None or match.difference is None:
        low, high = match.overlap
        why = "the ranges do not overlap" if low > high else "not between two strengths"
        return row | dict.fromkeys(("first", "second", "difference", "span", "verdict"), "") | {"why": why}
    return row | {
        "equal": f"{match.at} {match.level:.3f}",
        "first": f"{100 * match.values[0]:.1f}",
        "second": f"{100 * match.values[1]:.1f}",
        "difference": f"{100 * match.difference.mean:+.1f}",
        "span": _signed_span(match.difference, 1),
        "verdict": verdict(vars(match.difference), 0.0),
        "why": "",
    }


def _match_figures(match: Match) -> dict[str, object]:
    values, difference = match.values or ("", ""), match.difference
    return {
        "first": match.first,
        "second": match.second,
        "at": match.at,
        "reward": match.reward,
        "overlap/low": match.overlap[0],
        "overlap/high": match.overlap[1],
        "level": "" if match.level is None else match.level,
        "first/win_rate": values[0],
        "second/win_rate": values[1],
        "difference": "" if difference is None else difference.mean,
        "difference/low": "" if difference is None else difference.low,
        "difference/high": "" if difference is None else difference.high,
    }

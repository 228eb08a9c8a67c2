"""Draw small charts as inline SVG: intervals around a line, and training curves from a metrics.csv.

Colors are set by CSS classes (`series-0` ...) and variables of the page, so that light and dark mode both
work.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from capo.runtime.reading import read_rows
from capo.runtime.run_folder import CURVES_REMEDY

POINTS = 160  # maximum number of points of a curve; curves with more are averaged
SERIES = 10  # maximum number of curves in a chart, one per color
WIDTH, HEIGHT = 360, 200  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins of a chart, in SVG units
CLOCK = "time/"  # columns of metrics.csv that depend on the machine's speed
TOGETHER = {
    "train/drift_winner": "train/drift",
    "train/drift_loser": "train/drift",  # easiest to read in one chart
    "train/beta_h": "train/beta_h, dR",
    "train/dR": "train/beta_h, dR",
}
APART = ("val/score/", "val/held_out/score/")  # one chart per reward, since rewards have different scales
NESTED = "val/held_out/"  # grouped by three levels of the name, such as val/held_out/win_rate
ORDER = ("val/win_rate", "val/", "train/")  # charts are sorted by these title prefixes; others come last


@dataclass(frozen=True)
class Curve:
    """One column of metrics.csv over steps; `points` are finite (step, value), sorted by step."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart's curves; `reference`: y of a horizontal line; `left_out`: number of curves beyond SERIES."""

    title: str
    curves: Sequence[Curve]
    reference: float | None = None
    left_out: int = 0


def half_width(
    intervals: Iterable[tuple[float, float]], center: float, step: float = 0.1, most: float = math.inf
) -> float:
    """Smallest multiple of `step`, at most `most`, for which center ± it covers all (low, high) intervals."""
    reach = max((abs(value - center) for pair in intervals for value in pair), default=0.0)
    return min(max(math.ceil(reach / step - 1e-9), 1) * step, most)


def interval_bar(
    low: float, mean: float, high: float, center: float, half: float, band: tuple[float, float] | None = None
) -> Markup:
    """Draw an interval and its mean on an axis from center - half to center + half, with a line at `center`.

    `band` is a second interval (the zero line), drawn broad and pale behind the first. The SVG is as wide as
    its container.
    """

    def place(value: float) -> float:
        return min(max(50 + 50 * (value - center) / half, 0), 100)

    side = "up" if low > center else "down" if high < center else "level"
    back = ""
    if band is not None:
        start, stop = map(place, band)
        back = f'<rect class="band" x="{start:.2f}%" y="2" height="18" width="{stop - start:.2f}%"/>'
    return Markup(
        f'<svg class="interval {side}" width="100%" height="22" role="img" aria-label="{mean:.3f}, '
        f'95 % interval {low:.3f} to {high:.3f}">'
        f'<line class="axis" x1="0" x2="100%" y1="11" y2="11"/>{back}'
        f'<line class="center" x1="50%" x2="50%" y1="0" y2="22"/>'
        f'<rect class="span" x="{place(low):.2f}%" y="8" height="6" width="{place(high) - place(low):.2f}%"/>'
        f'<circle class="dot" cx="{place(mean):.2f}%" cy="11" r="5"/></svg>'
    )


def strength_chart(curve: Sequence[Mapping[str, Any]]) -> Chart:
    """Chart of the win-rates on validation prompts by strength, from `strength.json`; 0 is the base."""
    lines = {name: [(0.0, 0.5)] for point in curve for name in point["rewards"]}
    for point in curve:
        for name, rate in point["rewards"].items():
            lines[name].append((point["strength"], rate))
    return Chart(
        "win-rate by strength",
        [Curve(name, points) for name, points in list(lines.items())[:SERIES]],
        0.5,
        max(len(lines) - SERIES, 0),
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within [low, high], 1, 2 or 5 times a power of ten apart.

    The spacing may be up to a quarter smaller than `count` asks for, so that every range gets at least two
    ticks.
    """
    if not high > low:
        return [low]
    rough = 0.75 * (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def read_curves(path: str | Path) -> list[Chart]:
    """Read the numeric columns of a metrics.csv into charts, sorted by ORDER; [] if there is no such file.

    Columns `a/b` and `a/b/c` share the chart `a/b`. Columns in TOGETHER share the chart named there, columns
    that start with APART get one each. Rows without a step and cells without a finite number are ignored.
    Raises DamagedFile.
    """
    try:
        rows = read_rows(path, CURVES_REMEDY)
    except FileNotFoundError:
        return []
    groups: dict[str, list[Curve]] = {}
    for name in filter(_is_shown, rows[0] if rows else ()):
        group = (
            name
            if name.startswith(APART)
            else TOGETHER.get(name) or "/".join(name.split("/")[: 3 if name.startswith(NESTED) else 2])
        )
        if points := _points(rows, name):
            groups.setdefault(group, []).append(Curve(_label(name, group), thinned(points)))
    charts = [
        Chart(title, curves[:SERIES], 0.5 if _is_share(title) else None, max(len(curves) - SERIES, 0))
        for title, curves in groups.items()
    ]
    return sorted(charts, key=lambda chart: _rank(chart.title))


def _rank(title: str) -> int:
    return next((place for place, start in enumerate(ORDER) if title.startswith(start)), len(ORDER))


def _is_shown(name: str) -> bool:
    return name not in ("step", "epoch") and not name.startswith(CLOCK)


def _label(name: str, group: str) -> str:
    return name[len(group) + 1 :] if name.startswith(f"{group}/") else name.rsplit("/", 1)[-1]


def _is_share(title: str) -> bool:
    return "win_rate" in title or "accuracy" in title  # shares, for which 0.5 is chance level


def _points(rows: Sequence[dict[str, str]], name: str) -> list[tuple[float, float]]:
    points = [(_number(row.get("step")), _number(row.get(name))) for row in rows]
    return sorted(point for point in points if all(map(math.isfinite, point)))


def _number(cell: str | None) -> float:
    try:
        return float(cell or "")
    except ValueError:
        return math.nan


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """Average groups of consecutive points, equal in size but for the last, to at most `most` points."""
    run = math.ceil(len(points) / most) or 1
    chunks = [points[start : start + run] for start in range(0, len(points), run)]
    return [
        (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks
    ]


def line_chart(chart: Chart) -> Markup:
    """Draw a chart's curves over steps, with round ticks and, for several curves, a legend."""
    xs = [x for curve in chart.curves for x, _ in curve.points]
    ys = [y for curve in chart.curves for _, y in curve.points]
    references = [] if chart.reference is None else [chart.reference]
    place = _Placement(_padded(xs, 0.0), _padded(ys + references, 0.06))
    parts = [_y_tick(place, value) for value in ticks(*place.y_range)]
    parts += [_x_tick(place, value) for value in ticks(*place.x_range)]
    parts += [_level(place, value, "center") for value in references]
    parts += [_polyline(place, curve, number) for number, curve in enumerate(chart.curves)]
    start = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
    )
    return Markup(start + "".join(parts) + "</svg>" + _legend(chart))


@dataclass(frozen=True)
class _Placement:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    spread = (high - low) or max(abs(high), 1.0) * 0.1  # a constant curve needs a range, too
    room = spread * share if high > low else spread
    return low - room, high + room


def _level(place: _Placement, value: float, kind: str) -> str:
    y = place.y(value)
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _y_tick(place: _Placement, value: float) -> str:
    text = f'<text x="{LEFT - 6}" y="{place.y(value) + 3.5:.1f}" text-anchor="end">{value:.4g}</text>'
    return _level(place, value, "grid") + text


def _x_tick(place: _Placement, value: float) -> str:
    return f'<text x="{place.x(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:.6g}</text>'


def _polyline(place: _Placement, curve: Curve, number: int) -> str:
    points = [f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in curve.points]
    if len(points) == 1:
        x, y = points[0].split(",")
        return f'<circle class="series-{number} point" cx="{x}" cy="{y}" r="3"/>'
    return f'<polyline class="series-{number}" points="{" ".join(points)}"/>'


def _legend(chart: Chart) -> str:
    if len(chart.curves) < 2 and not chart.left_out:
        return ""
    entries = [
        f'<li class="series-{number}">{escape(curve.label)}</li>' for number, curve in enumerate(chart.curves)
    ]
    more = [f"<li>and {chart.left_out} more in metrics.csv</li>"] if chart.left_out else []
    return f'<ul class="legend">{"".join(entries + more)}</ul>'

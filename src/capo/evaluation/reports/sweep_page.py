"""Present the results of a sweep: win-rates over the swept axis or reward against reward, and a page."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capo.evaluation.reports.formats import verdict
from capo.evaluation.reports.frontiers import COLORS, MethodComparison
from capo.evaluation.reports.pictures import png_of
from capo.evaluation.reports.templating import page_template

Row = Mapping[str, object]  # column -> value of a row of sweep.csv
# a column of sweep.csv, and three prefixes of its columns
VALIDATION, TEST, ZERO, ORACLE = "val/win_rate", "test/win_rate/", "zero/", "oracle/"
WIDE = 5  # a positive axis is logarithmic if its ends differ by at least this factor


def named(rows: Sequence[Row], start: str) -> dict[str, str]:
    """Map each reward or measure in the rows to its column `start` + name; leave out columns of bounds."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return {
        name.removeprefix(start): name
        for name in columns
        if name.startswith(start) and "/" not in name.removeprefix(start)
    }


def number_of(value: Any) -> float:
    """Convert a value to a number; NaN if it is not one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def swept_axis(rows: Sequence[Row], keys: Sequence[str]) -> str | None:
    """Key for the x-axis: the numeric key with the most values, else the first key, else None."""
    return strength_axis(rows, keys) or next(iter(keys), None)


def strength_axis(rows: Sequence[Row], keys: Sequence[str]) -> str | None:
    """The key with the most values among those that are numbers wherever they are given; None without one."""
    numeric = {key: {row[key] for row in rows} - {"", "None", "null"} for key in keys}
    numeric = {
        key: values
        for key, values in numeric.items()
        if values and all(math.isfinite(number_of(value)) for value in values)
    }
    return max(numeric, key=lambda key: len(numeric[key]), default=None)


def setting_of(row: Row, keys: Sequence[str]) -> str:
    """Name what a row has of these keys: `objective=capo, objective.beta=300`; "" for a key that it lacks."""
    return ", ".join(f"{key}={row.get(key, '')}" for key in keys)


def curves(rows: Sequence[Row], keys: Sequence[str], axis: str) -> dict[str, list[Row]]:
    """Group the rows by the values of the other keys, `key=value, ...` -> rows sorted along `axis`."""
    others = [key for key in keys if key != axis]
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (math.isnan(place := number_of(row[axis])), place)):
        groups.setdefault(setting_of(row, others), []).append(row)
    return groups


def sweep_picture(rows: Sequence[Row], keys: Sequence[str]) -> bytes | None:
    """The figure of `drawn` as PNG bytes, or None."""
    figure = drawn(rows, keys)
    return None if figure is None else png_of(figure)


def drawn(rows: Sequence[Row], keys: Sequence[str]) -> Figure | None:
    """Draw win-rates over what varies; None if no key varies or no job has a win-rate."""
    columns = [VALIDATION, *named(rows, TEST).values()]  # a soup has no validation
    done = [row for row in rows if any(math.isfinite(number_of(row.get(column))) for column in columns)]
    axis = swept_axis(done, keys) if done else None
    return None if axis is None else _over_axis(done, keys, axis, list(named(done, TEST)))


def _over_axis(rows: Sequence[Row], keys: Sequence[str], axis: str, rewards: Sequence[str]) -> Figure:
    """Draw each reward's win-rate with its interval over `axis`, and the validation win-rate."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    place, numbers = _places(rows, axis, axes)
    solid, dashed = ("-o", "--o") if numbers else ("o", "o")  # names have no order that a line could follow
    names = {f"{TEST}{name}": name for name in rewards}
    for label, group in curves(rows, keys, axis).items():
        for number, (column, name) in enumerate(names.items()):
            places, color = [place(row) for row in group], COLORS[number % len(COLORS)]
            _line(axes, places, group, column, solid, color, name)
            zero = [100 * number_of(row.get(f"{ZERO}{name}")) for row in group]
            axes.plot(places, zero, ":", color=color, linewidth=1)
        xs, ys = [place(row) for row in group], [100 * number_of(row.get(VALIDATION)) for row in group]
        axes.plot(
            xs,
            ys,
            dashed,
            markersize=3,
            linewidth=1,
            label=f"validation, mean {label}".strip(),
            color=None if label else "#8d94a1",
        )
    axes.axhline(50, color="#8d94a1", linewidth=1, linestyle="--")
    axes.set_xlabel(axis)
    axes.set_ylabel("win-rate against the base, %")
    axes.legend(frameon=False)
    return figure


def _places(rows: Sequence[Row], axis: str, axes: Axes):
    """Return a function row -> position on the axis, and whether that is a number; set up ticks and scale."""
    values = [number_of(row[axis]) for row in rows]
    if not all(map(math.isfinite, values)):
        names = list(dict.fromkeys(str(row[axis]) for row in rows))
        axes.set_xticks(range(len(names)), names)
        return lambda row: names.index(str(row[axis])), False
    if min(values) > 0 and max(values) / min(values) >= WIDE:
        axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axes.minorticks_off()
    return lambda row: number_of(row[axis]), True


def _line(
    axes: Axes, xs: Sequence[float], rows: Sequence[Row], column: str, form: str, color: str, label: str
) -> None:
    ys = [100 * number_of(row.get(column)) for row in rows]
    axes.errorbar(
        xs, ys, yerr=_errors(rows, column), fmt=form, markersize=5, capsize=3, color=color, label=label
    )


def _errors(rows: Sequence[Row], column: str) -> list[list[float]]:
    """Distances from the mean down and up to the ends of the interval, in percentage points."""
    middle = [number_of(row.get(column)) for row in rows]
    low = [number_of(row.get(f"{column}/low")) for row in rows]
    high = [number_of(row.get(f"{column}/high")) for row in rows]
    return [
        [100 * (m - end) for m, end in zip(middle, low, strict=True)],
        [100 * (end - m) for m, end in zip(middle, high, strict=True)],
    ]


def render_page(
    title: str,
    rows: Sequence[Row],
    keys: Sequence[str],
    picture: bytes | None,
    compared: MethodComparison | None = None,
) -> str:
    """Render the offline page of a sweep: pictures, frontiers, and a row per job that links to its report."""
    rewards, measures = list(named(rows, TEST)), list(named(rows, ORACLE))
    jobs = [_job(row, keys, rewards, measures) for row in rows]
    return page_template("sweep.html.j2").render(
        title=title,
        keys=keys,
        rewards=rewards,
        measures=measures,
        jobs=jobs,
        zero=bool(named(rows, ZERO)),
        finished=sum(job["status"] == "finished" for job in jobs),
        compared=compared,
        picture=picture and base64.b64encode(picture).decode(),
    )


def _job(row: Row, keys: Sequence[str], rewards: Sequence[str], measures: Sequence[str]) -> dict[str, object]:
    """Values that the page shows of a job."""
    evaluated = any(math.isfinite(number_of(row.get(f"{TEST}{name}"))) for name in rewards)
    return {
        "name": row["job"],
        "status": row["status"],
        "error": row["error"],
        "given": [row[key] for key in keys],
        "report": f"{row['job']}/evaluation/report.html" if evaluated else None,
        "validation": percent(row, VALIDATION),
        "rates": [_rate(row, f"{TEST}{name}") for name in rewards],
        "zero": [percent(row, f"{ZERO}{name}") for name in rewards],
        "measures": [moved(row, f"{ORACLE}{name}") for name in measures],
    }


def percent(row: Row, column: str) -> str:
    """Format a column as a percentage; `-` if the row has no value."""
    share = number_of(row.get(column))
    return f"{100 * share:.1f}" if math.isfinite(share) else "-"


def interval(row: Row, column: str) -> str:
    """Format the 95 % interval of a column in %; empty if the row has none."""
    low, high = percent(row, f"{column}/low"), percent(row, f"{column}/high")
    return "" if low == "-" else f"{low}–{high}"


def moved(row: Row, column: str) -> str:
    """Format a measure as `base → policy`; `-` if the row has none."""
    base, policy = number_of(row.get(f"{column}/base")), number_of(row.get(column))
    return f"{base:.3f} → {policy:.3f}" if math.isfinite(base) and math.isfinite(policy) else "-"


def _rate(row: Row, column: str) -> dict[str, str]:
    bounds = {end: number_of(row.get(f"{column}/{end}")) for end in ("low", "high")}
    return {"rate": percent(row, column), "span": interval(row, column), "verdict": verdict(bounds, 0.5)}

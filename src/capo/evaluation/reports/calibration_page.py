"""Present a calibration report: figure (CaPO, figure 6), offline HTML page, JSON and console table."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from capo.errors import InputError
from capo.evaluation.reports.calibration_advice import override, warnings_of
from capo.evaluation.reports.calibration_figures import CalibrationReport, Histogram, RewardFigures
from capo.evaluation.reports.calibration_report import TARGET
from capo.evaluation.reports.pictures import png_of
from capo.evaluation.reports.templating import page_template
from capo.runtime.files import REMEDY, fresh_folder

STEM = "calibration"  # file name of the three files, without extension
RAW, CALIBRATED, WINNERS, LOSERS = "#5a6170", "#2563a8", "#2a8a5a", "#cf5f27"
GRAY, PALE = "#8d94a1", "#dfe3ea"


def write_report(
    folder: str | Path, title: str, report: CalibrationReport, settings: Mapping[str, object]
) -> list[str]:
    """Write calibration.json, .png and .html to `folder`, which is replaced as a whole; return the warnings.

    `settings` describes the data and goes into page and JSON. It should hold no path and no time, so that
    equal figures give equal bytes. Raises InputError if the folder cannot be written.
    """
    warnings, png = warnings_of(report), picture(report)
    figures = {"settings": dict(settings), "warnings": warnings, **dataclasses.asdict(report)}
    try:
        with fresh_folder(folder, f"{STEM}.json") as fresh:
            (fresh / f"{STEM}.json").write_text(
                json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
            (fresh / f"{STEM}.png").write_bytes(png)
            (fresh / f"{STEM}.html").write_text(
                render_page(title, report, settings, warnings, png), encoding="utf-8"
            )
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): {REMEDY}") from error
    return warnings


def picture(report: CalibrationReport) -> bytes:
    """Draw the report as PNG bytes.

    Each reward has a row with histograms of its raw scores and calibrated rewards; the last row shows the
    sizes of X+ and X- and the rank correlations.
    """
    rows = len(report.rewards) + 1
    figure = Figure(figsize=(9, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    for (name, reward), (left, right) in zip(report.rewards.items(), panels, strict=False):
        _draw_raw(left, name, reward)
        _draw_calibrated(right, name, reward, report.method)
    _draw_sizes(panels[-1][0], report)
    _draw_correlation(panels[-1][1], report)
    return png_of(figure, metadata={"Software": None})


def _draw_raw(axes: Axes, name: str, reward: RewardFigures) -> None:
    axes.set_title(f"{name}: raw scores", fontsize=9)
    if reward.raw is None:
        axes.text(
            0.5,
            0.5,
            "a human choice: ranks, no scores",
            ha="center",
            va="center",
            color=GRAY,
            transform=axes.transAxes,
        )
        axes.set_axis_off()
        return
    _bars(axes, reward.raw, RAW)
    if reward.declared is not None:
        axes.axvspan(*reward.declared, color=PALE, zorder=0)  # the range where scores usually lie
        axes.set_xlim(reward.raw.low, reward.raw.high)


def _draw_calibrated(axes: Axes, name: str, reward: RewardFigures, method: str) -> None:
    shares = "" if reward.flat is None else f", flat {reward.flat:.0%}, saturated {reward.saturated:.0%}"
    axes.set_title(f"{name}: {method}, spread {reward.spread:.3f}{shares}", fontsize=9)
    _bars(axes, reward.calibrated, CALIBRATED)
    if method == "win_rate":
        axes.axvline(0.5, color=GRAY, linewidth=1, linestyle="--")


def _bars(axes: Axes, found: Histogram, color: str) -> None:
    edges, counts = np.linspace(found.low, found.high, len(found.counts) + 1), np.array(found.counts)
    axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=color)
    axes.set_xlim(found.low, found.high)
    axes.set_ylabel("candidates, %", fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_sizes(axes: Axes, report: CalibrationReport) -> None:
    selected = report.selection
    axes.set_title(f"sizes of X+ and X-, pairs={selected.strategy}", fontsize=9)
    for shift, label, color, counts in (
        (-0.2, "X+", WINNERS, selected.winners),
        (0.2, "X-", LOSERS, selected.losers),
    ):
        axes.bar(
            np.arange(len(counts)) + shift,
            100 * np.array(counts) / report.prompts,
            width=0.4,
            label=label,
            color=color,
        )
    axes.set_xlabel(f"candidates of {report.candidates}", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("prompts, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8)


def _draw_correlation(axes: Axes, report: CalibrationReport) -> None:
    names = list(report.rewards)
    if len(names) < 2:
        axes.set_axis_off()
        return
    values = np.array([[np.nan if value is None else value for value in row] for row in report.correlation])
    axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axes.set_title("rank correlation within a prompt", fontsize=9)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column,
            row,
            signed(report.correlation[row][column]),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if abs(value) > 0.6 else "black",
        )


def render_page(
    title: str, report: CalibrationReport, settings: Mapping[str, object], warnings: Sequence[str], png: bytes
) -> str:
    """Render the offline HTML page: the warnings, the picture `png`, and the figures as tables."""
    return page_template("calibration.html.j2", share, plain, signed).render(
        title=title,
        report=report,
        settings=settings,
        warnings=warnings,
        picture=base64.b64encode(png).decode(),
        target=TARGET,
        overrides={name: suggested(name, reward) for name, reward in report.rewards.items()},
        sizes={"X+": sizes(report.selection.winners), "X-": sizes(report.selection.losers)},
    )


def share(value: float | None) -> str:
    """Format a share: 0.634 -> `63.4 %`, None -> `-`."""
    return "-" if value is None else f"{100 * value:.1f} %"


def plain(value: float | None) -> str:
    """Format with four significant digits; None -> `-`."""
    return "-" if value is None else f"{value:.4g}"


def signed(value: float | None) -> str:
    """Format with a sign and two decimals; a value that rounds to zero gives `+0.00`, None `-`."""
    return "-" if value is None else f"{round(value, 2) + 0.0:+.2f}"


def suggested(name: str, reward: RewardFigures) -> str:
    """Override that gives the median pair win-rate TARGET, or the reason why there is none."""
    if reward.median_gap is None:
        return "human choice"
    return "no scale helps" if reward.suggested_scale is None else override(name, reward.suggested_scale)


def sizes(counts: Sequence[int]) -> dict[str, float]:
    """Mean, quantiles and empty share of set sizes; `counts[k]` prompts have a set of k candidates."""
    every = np.repeat(np.arange(len(counts)), counts)
    quantiles = np.quantile(every, (0, 0.1, 0.5, 0.9, 1), method="inverted_cdf")
    names = ("lowest", "10 %", "median", "90 %", "highest")
    return {
        "mean": float(every.mean()),
        **dict(zip(names, map(float, quantiles), strict=True)),
        "empty": counts[0] / sum(counts),
    }


def print_report(report: CalibrationReport, warnings: Sequence[str], console: Console) -> None:
    """Print a table with one row per reward, a line on the pairs, and the warnings."""
    table = Table(
        "reward",
        "scale",
        "median pair",
        "spread",
        "flat",
        "saturated",
        f"for {TARGET:g}",
        box=box.SIMPLE_HEAD,
        title=f"calibration={report.method}: {report.prompts} prompts x {report.candidates} candidates",
    )
    for name, reward in report.rewards.items():
        scale = (
            plain(reward.suggested_scale) if reward.suggested_scale is not None else suggested(name, reward)
        )
        table.add_row(
            name,
            f"{reward.scale:g}",
            plain(reward.pair_win_rate),
            f"{reward.spread:.3f}",
            share(reward.flat),
            share(reward.saturated),
            scale,
        )
    console.print(table)
    winners, losers = sizes(report.selection.winners), sizes(report.selection.losers)
    console.print(
        f"X+ / X-: {winners['mean']:.1f} / {losers['mean']:.1f} candidates per prompt, "
        f"{report.selection.mean_pairs:.1f} pairs to draw from, {report.selection.skipped} prompts skipped",
        highlight=False,
        soft_wrap=True,
    )
    print_warnings(warnings, console)


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """Print each warning as a yellow line."""
    for warning in warnings:
        console.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)

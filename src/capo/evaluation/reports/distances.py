"""Show diversity and drift: how the images of a prompt differ, and how far policy and base are apart."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from capo.evaluation.reports.charts import half_width, interval_bar
from capo.evaluation.reports.formats import verdict


def distance_rows(results: Mapping) -> tuple[float, list[dict]]:
    """Half the width of the axis, and a row for the distances of latents and, if measured, of features.

    Changes of diversity are relative to the base's, and the drift is a multiple of that; where the images of
    the base are all equal, both are distances as they are.
    """
    measured = {"latents": (results["diversity"], results["drift"]["latents"])}
    if features := results.get("features"):
        measured["features"] = features["diversity"], features["drift"]
    changes = [_relative(diversity) for diversity, _ in measured.values()]
    half = half_width([(low, high) for low, _, high in changes], 0.0)
    rows = [
        {"name": name, **_row(change, *figures, half)}
        for change, (name, figures) in zip(changes, measured.items(), strict=True)
    ]
    return half, rows


def _relative(diversity: Mapping[str, float]) -> tuple[float, float, float]:
    """Lower end, mean and upper end of the change of diversity, relative to the base's."""
    unit = diversity["base"] or 1.0
    return diversity["low"] / unit, (diversity["policy"] - diversity["base"]) / unit, diversity["high"] / unit


def _row(
    changes: tuple[float, float, float],
    diversity: Mapping[str, float],
    drift: Mapping[str, float],
    half: float,
) -> dict:
    low, change, high = changes
    return {
        "base": diversity["base"],
        "policy": diversity["policy"],
        "change": change,
        "low": low,
        "high": high,
        "p": diversity["p"],
        "verdict": verdict({"low": low, "high": high}, 0.0),
        "bar": interval_bar(low, change, high, 0.0, half),
        "drift": drift["mean"],
        "relative_drift": drift["mean"] / (diversity["base"] or 1.0),
    }


def fallen_diversity(results: Mapping) -> list[str]:
    """Warn of a diversity that has fallen beyond its interval, by kind of distance."""
    features = results.get("features")
    measured = {"latents": "latents"}
    if features:
        measured["features"] = f"what '{features['reward']}' sees in images, {features['prompts']} prompts"
    return [
        f"diversity falls by {-100 * row['change']:.1f} % ({-100 * row['high']:.1f} "
        f"to {-100 * row['low']:.1f} %; {measured[row['name']]}): the policy's images of a "
        "prompt differ less than the base's. A larger objective.beta or fewer steps keep more of the base."
        for row in distance_rows(results)[1]
        if row["verdict"] == "below"
    ]


def block_rows(results: Mapping) -> list[tuple[str, float, float]]:
    """Blocks of the denoiser whose weights moved: name, relative change, and its share of the largest one."""
    blocks = results["drift"].get("weights", {}).get("blocks", {})
    moved = {name: change for name, change in blocks.items() if change}
    return [(name, change, change / max(moved.values())) for name, change in moved.items()]


def distance_table(results: Mapping) -> Table:
    """Return a table of diversity and drift, with the drift of the weights in its caption."""
    table = Table(
        "distance",
        "diversity, base → policy",
        "change %",
        "95 % interval",
        "drift",
        box=box.SIMPLE_HEAD,
        caption=_weights_line(results),
        caption_justify="left",
    )
    for row in distance_rows(results)[1]:
        table.add_row(
            row["name"],
            f"{row['base']:.3g} → {row['policy']:.3g}",
            f"{100 * row['change']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            f"{row['drift']:.3g}",
            style="red" if row["verdict"] == "below" else "",
        )
    return table


def _weights_line(results: Mapping) -> str | None:
    weights = results["drift"].get("weights")
    if weights is None or weights["all"] is None:
        return None
    return f"drift of the weights: {weights['all']:.3g} of their norm"

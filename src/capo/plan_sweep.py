"""Plans of a sweep's jobs beside one another: which figures of a `plan.json` stand in a row, and how they read."""

from __future__ import annotations

from collections.abc import Mapping

from capo.lacking import readable

# heading on the console -> figure; two tables, so that numbers stay whole on 80 columns
HOLDS = {"parameters": "parameters/denoiser", "trained": "parameters/trained", "device": "device/peak", "pools": "disk/pools"}
TAKES = {"steps": "steps", "images": "images", "training h": "hours/training", "drawing h": "hours/sampling", "missing": "missing",
         "certain": "missing/certain"}  # fmt: skip
BYTES = ("device/peak", "disk/pools")


def plan_figures(plan: Mapping) -> dict[str, float | None]:
    """A plan's figures, under the names of `plans.csv`'s columns: bytes, hours and counts; None where the plan does not know.

    `missing` counts what this machine lacks, `missing/certain` what a run could not begin with.
    """
    disk, hours, lacking = plan["disk"], plan["hours"], plan["missing here"]
    return {
        "parameters/denoiser": plan["parameters"]["denoiser"],
        "parameters/trained": plan["parameters"]["trained"],
        "device/peak": plan["device"]["peak"],
        "host/peak": plan["host"]["peak"],
        "disk/pools": disk["pools"]["total"],
        "disk/run": disk["run"]["total"],
        "images": hours["images"],
        "steps": plan["steps"],
        "hours/training": hours["training"],
        "hours/sampling": hours["sampling"],
        "missing": len(lacking),
        "missing/certain": sum(entry["certain"] for entry in lacking),
    }


def plan_cell(figures: Mapping[str, float | None], name: str) -> str:
    """A figure as the console shows it; `unknown` where the plan does not know."""
    value = figures[name]
    if value is None:
        return "unknown"
    if name in BYTES:
        return readable(value)
    if name.startswith("hours/"):
        return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"
    return f"{value:,}"

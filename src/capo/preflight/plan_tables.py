"""Print a plan as a table, and extract the figures by which plans are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from capo.preflight.shortages import device_bytes, readable
from capo.runtime.launch import Division
from capo.runtime.outlook import DECODING, LATENTS, STAGES, TRAINING, Hours


def _last(node: dict) -> str:
    return node["_target_"].rsplit(".", 1)[-1]


def _settings(plan: dict) -> list[tuple[str, str]]:
    division, cfg = plan["division"], plan["config"]
    trainer, objective = cfg["trainer"], cfg["objective"]
    name, there = device_bytes(trainer["accelerator"])
    return [
        (
            "model",
            f"{plan['model']}: {plan['parameters']['denoiser']:,} parameters, "
            f"{plan['parameters']['trained']:,} trained",
        ),
        (
            "objective",
            f"{_last(objective)}, beta {objective.get('beta')}; pairs {_last(cfg['pairs'])}; "
            f"rewards {', '.join(cfg['rewards'])}",
        ),
        (
            "step",
            f"{division['pairs']} pairs: "
            f"{Division(division['devices'], division['micro_batch'], division['accumulate'])}",
        ),
        (
            "how",
            f"{trainer['precision']}, {trainer['optimizer']}, gradient checkpointing "
            f"{'on' if trainer['gradient_checkpointing'] else 'off'}, strategy {trainer['strategy']}",
        ),
        ("steps", f"{plan['steps']:,}, learning rate {trainer['lr']:g}, warm-up {trainer['warm_up']}"),
        (
            "prompts",
            ", ".join(
                f"{split} {'unknown' if count is None else f'{count:,}'}"
                for split, count in plan["prompts"].items()
            ),
        ),
        ("device here", f"{name}, {readable(there)}"),
    ]


def _parts(told: dict[str, float]) -> str:
    return ", ".join(f"{name} {readable(size)}" for name, size in told.items() if name != "total")


def _figures(plan: dict) -> list[tuple[str, str]]:
    rows = []
    for place in ("device", "host"):
        rows += [
            (f"{place}, {phase}", f"{readable(parts['total'])}: {_parts(parts)}")
            for phase, parts in plan[place].items()
            if phase != "peak"
        ]
        rows.append((f"{place}, peak", readable(plan[place]["peak"])))
    flops, hours, disk = plan["flops"], plan["hours"], plan["disk"]
    return [
        *rows,
        ("TFLOP", f"{flops['pair'] / 1e12:,.3g} per pair, {flops['image'] / 1e12:,.3g} per generated image"),
        ("hours", hours_line(hours)),
        ("rates", _basis(hours)),
        ("disk, pools", f"{readable(disk['pools']['total'])}: {_parts(disk['pools'])}"),
        ("disk, run", f"{readable(disk['run']['total'])}: {_parts(disk['run'])}"),
    ]


def hours_line(hours: Mapping) -> str:
    """Hours by stage and in all, in one line; a stage without rates for all of its work is a lower bound."""
    told = [f"{stage} {_hours(hours, stage)}" for stage in STAGES if stage in hours]
    return f"{_hours(hours, 'total')} in all: {', '.join(told)}"


def _hours(hours: Mapping, name: str) -> str:
    return str(Hours(hours[name] or 0.0, tuple(hours["without"].get(name, ()))))


def _basis(hours: Mapping) -> str:
    """What the hours follow from: operations for some kinds of work, and rates for the others."""
    by_origin: dict[str, list[str]] = {}
    for name, origin in hours["rates"].items():
        by_origin.setdefault(origin, []).append(name)
    counted = [kind for kind in (LATENTS, DECODING, TRAINING) if kind not in hours["rates"]]
    share = f"{hours['utilization']:.0%} of {hours['flops'] / 1e12:,.0f} TFLOP/s per device"
    told = [f"{', '.join(counted)}: {share} ({hours['peak of']})"] if counted else []
    return "; ".join([*told, *(f"{', '.join(names)}: {origin}" for origin, names in by_origin.items())])


def print_plan(plan: dict, console: Console) -> None:
    """Print settings and figures as a table, then the notes and what is missing on this machine."""
    table = Table(title="plan", show_header=False, title_justify="left")
    for name, value in [*_settings(plan), *_figures(plan)]:
        table.add_row(name, value)
    console.print(table)
    _print_list(console, "notes", plan["notes"])
    _print_list(console, "missing here", [entry["message"] for entry in plan["missing here"]] or ["nothing"])


def _print_list(console: Console, title: str, lines: Sequence[str]) -> None:
    console.print(title, style="bold")
    for line in lines:
        console.print(f"  - {line}", markup=False, highlight=False)


# Heading on the console -> figure. There are two tables, so that no number is broken at 80 columns.
HOLDS = {
    "parameters": "parameters/denoiser",
    "trained": "parameters/trained",
    "device": "device/peak",
    "pools": "disk/pools",
}


TAKES = {
    "steps": "steps",
    "images": "images",
    "training h": "hours/training",
    "total h": "hours/total",
    "missing": "missing",
    "certain": "missing/certain",
}


BYTES = ("device/peak", "disk/pools")


def plan_figures(plan: Mapping) -> dict[str, float | None]:
    """Extract a plan's figures under the column names of `plans.csv`: bytes, hours and counts; None: unknown.

    `missing` counts what this machine lacks, and `missing/certain` the part of it without which no run can
    start.
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
        "hours/total": hours["total"],
        "missing": len(lacking),
        "missing/certain": sum(entry["certain"] for entry in lacking),
    }


def plan_cell(figures: Mapping[str, float | None], name: str) -> str:
    """Format a figure for the console; `unknown` for None."""
    value = figures[name]
    if value is None:
        return "unknown"
    if name in BYTES:
        return readable(value)
    if name.startswith("hours/"):
        return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"
    return f"{value:,}"

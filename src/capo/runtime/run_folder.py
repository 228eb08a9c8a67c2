"""A run directory: the names of everything in it, and the outcome of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

from capo.runtime.files import write_whole

CONFIG, OUTCOME, ERROR = (
    "config.yaml",
    "outcome.json",
    "error.txt",
)  # configuration; written at the end; of a failed job
METRICS, CHECKPOINTS, LAST = "metrics.csv", "checkpoints", "last.ckpt"
CALIBRATION, VALIDATION, POLICY = (
    "calibration",
    "validation",
    "policy",
)  # folders: report, image grids, exported policy
EVALUATION = "evaluation"  # folder of what follows
RESULTS, SETTINGS, REPORT, POOLS = "results.json", "settings.json", "report.html", "pool"
MONITOR = "val/win_rate"  # figure by which checkpoints are compared, and key of the outcome
PLAN, CHECK = "plan.json", "check.json"  # of plan=true and check=true, which begin no run


def read_outcome(folder: Path) -> dict[str, object]:
    """The outcome of a finished run."""
    return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))


def write_outcome(folder: Path, outcome: dict[str, object]) -> None:
    """`outcome.json`, whose presence marks a run as finished."""
    write_whole(folder / OUTCOME, json.dumps(outcome, indent=2) + "\n")

"""Names of the files in a run directory, and the outcome that marks a run as finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capo.errors import DamagedFile
from capo.runtime.files import write_whole
from capo.runtime.reading import read_json

# resolved configuration; result of a finished run; error of a failed job
CONFIG, OUTCOME, ERROR = "config.yaml", "outcome.json", "error.txt"
METRICS, CHECKPOINTS, LAST = "metrics.csv", "checkpoints", "last.ckpt"
CURVES_REMEDY = "restore it, or remove it: the curves then begin anew"  # of metrics.csv and pools.csv
POOL_CURVES = "pools.csv"  # shares and rates of pools while they were filled, over seconds
STRENGTH = "strength.json"  # win-rates on validation prompts by strength
# folders: calibration report, image grids, exported policy
CALIBRATION, VALIDATION, POLICY = "calibration", "validation", "policy"
EVALUATION = "evaluation"  # folder of the files in the next line
RESULTS, SETTINGS, REPORT, POOLS = "results.json", "settings.json", "report.html", "pool"
RATES = "win_rates.csv"  # of an evaluation, by prompt
MONITOR = "val/win_rate"  # metric by which checkpoints are compared; also a key of the outcome
WRITTEN = (CALIBRATION, VALIDATION, POLICY, EVALUATION, CHECKPOINTS, METRICS, STRENGTH, OUTCOME)  # by a run
PLAN, CHECK = "plan.json", "check.json"  # written by plan=true and check=true, which start no run


def read_outcome(folder: Path) -> dict[str, Any]:
    """Read `outcome.json` of a finished run; InputError if there is none, or it cannot be read."""
    path, remedy = folder / OUTCOME, "restore it, or train again"
    try:
        return read_json(path, remedy)
    except FileNotFoundError as error:
        raise DamagedFile(path, "it is not there", remedy) from error


def write_outcome(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Write `outcome.json`, whose presence marks a run as finished."""
    write_whole(folder / OUTCOME, json.dumps(outcome, indent=2) + "\n")

"""Names of the files in a run directory, and the outcome that marks a run as finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from capo.errors import DamagedFile
from capo.runtime.files import write_json
from capo.runtime.schema import Section, key
from capo.runtime.stored import Record, read_record

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
WORKERS = "workers"  # folder of the logs of rewards
WRITTEN = (CALIBRATION, VALIDATION, POLICY, EVALUATION, CHECKPOINTS, METRICS, STRENGTH, OUTCOME)  # by a run
PLAN, CHECK = "plan.json", "check.json"  # written by plan=true and check=true, which start no run


class Card(Section):
    """Facts for the policy's README (`capo.backbones.model_card.ModelCard`)."""

    objective: str = key("name of the objective")
    data: str = key("description of the training data")
    win_rates: dict[str, dict[str, float]] | None = key("win-rates by reward", None)
    settings: dict[str, Any] = key("further facts by name", {})
    unconditional: str = key("source of the unconditional prediction", "policy")


class Outcome(Record):
    """What is read of outcome.json; that of a soup has no win-rate and no card."""

    best: float = Field(0.0, alias=MONITOR, description="best validation win-rate")
    card: Card | None = key("facts for the policy's README", None)


class FinishedOutcome(Outcome):
    """Outcome of a training run."""

    best: float = Field(alias=MONITOR, description="best validation win-rate")


def read_outcome(folder: Path) -> dict[str, Any]:
    """Read `outcome.json` of a finished run; InputError if there is none, or it cannot be read."""
    return _outcome(folder, Outcome)


def best_win_rate(folder: Path) -> float:
    """Best validation win-rate of a finished run, in 0-1; InputError if its outcome lacks it."""
    return _outcome(folder, FinishedOutcome)[MONITOR]


def _outcome(folder: Path, schema: type[Outcome]) -> dict[str, Any]:
    path, remedy = folder / OUTCOME, "restore it, or train again"
    try:
        return read_record(path, schema, remedy)
    except FileNotFoundError as error:
        raise DamagedFile(path, "it is not there", remedy) from error


def write_outcome(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Write `outcome.json`, whose presence marks a run as finished."""
    write_json(folder / OUTCOME, outcome)

"""Names of the files in a run directory, the outcome of a finished run, and who is at work there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from capo.errors import DamagedFile, InputError
from capo.runtime.files import put_back, write_json
from capo.runtime.launch import launch
from capo.runtime.locks import file_lock
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
# what each round of training had, and the folder of the policies that drew candidates anew, with their pools
ROUNDS, ONLINE = "rounds.csv", "online"
EVALUATION = "evaluation"  # folder of the files in the next line
RESULTS, SETTINGS, REPORT, POOLS = "results.json", "settings.json", "report.html", "pool"
RATES = "win_rates.csv"  # of an evaluation, by prompt
BENCHMARKS, STUDY = "benchmarks", "study"  # folders of public benchmarks, and of a study with people
ANEW = "remove it to start training again"  # a checkpoint that cannot be read, of a run that is not finished
MONITOR = "val/win_rate"  # metric by which checkpoints are compared; also a key of the outcome
WORKERS = "workers"  # folder of the logs of rewards
# a directory that holds one of these without a config.yaml is refused, since a run would replace it
WRITTEN = (
    CALIBRATION,
    VALIDATION,
    POLICY,
    EVALUATION,
    CHECKPOINTS,
    METRICS,
    STRENGTH,
    ROUNDS,
    ONLINE,
    OUTCOME,
)
TRAINED = (CALIBRATION, VALIDATION, POLICY, EVALUATION, CHECKPOINTS, ONLINE, WORKERS)  # its folders
LOCK = ".lock"  # while a command trains there
PATIENCE = 10.0  # seconds for what a killed command had started to end, since it holds the lock too
# written by plan=true and check=true, which start no run; the last is the folder of pictures of check=true
PLAN, CHECK, SAMPLES = "plan.json", "check.json", "check"
STATUS = "status.json"  # of pools
TABLES = "table.csv", "table.html", "table.tex"  # of runs that are compared
SWEEP, PLANS = ("sweep.csv", "sweep.png", "sweep.html"), "plans.csv"  # of a sweep's jobs, or their plans


class Card(Section):
    """Facts for the policy's README (`capo.backbones.model_card.ModelCard`)."""

    objective: str = key("name of the objective")
    data: str = key("description of the training data")
    win_rates: dict[str, dict[str, float]] | None = key("win-rates by reward", None)
    settings: dict[str, Any] = key("further facts by name", {})
    unconditional: str = key("source of the unconditional prediction", "policy")


class Outcome(Record):
    """What is read of outcome.json; that of a soup has no win-rate, fingerprint and card."""

    best: float = Field(0.0, alias=MONITOR, description="best validation win-rate")
    policy: str | None = key("fingerprint of the exported policy", None)
    card: Card | None = key("facts for the policy's README", None)


class FinishedOutcome(Outcome):
    """Outcome of a training run."""

    best: Annotated[float, Field(ge=0, le=1)] = Field(alias=MONITOR, description="best validation win-rate")


def read_outcome(folder: Path) -> dict[str, Any]:
    """Read `outcome.json` of a finished run; InputError if there is none, or it cannot be read."""
    return _outcome(folder, Outcome)


def best_win_rate(folder: Path) -> float:
    """Best validation win-rate of a finished run, in 0-1; InputError if its outcome lacks it."""
    return _outcome(folder, FinishedOutcome)[MONITOR]


def _outcome(folder: Path, schema: type[Outcome]) -> dict[str, Any]:
    path, remedy = folder / OUTCOME, "restore it, or remove it and train again in the same directory"
    try:
        return read_record(path, schema, remedy)
    except FileNotFoundError as error:
        raise DamagedFile(path, "it is not there", remedy) from error


def check_policy(folder: Path) -> None:
    """Raise DamagedFile if the policy of the finished run in `folder` is gone."""
    put_back(folder / POLICY)
    if not (folder / POLICY).is_dir():
        remedy = f"restore it, or remove {folder / OUTCOME}, and the run's train.py command exports it again"
        raise DamagedFile(folder / POLICY, "it is not there", remedy)


def last_remedy(folder: Path) -> str:
    """What to do where `last.ckpt` of the run in `folder`, from which training goes on, is of no use."""
    last = folder / CHECKPOINTS / LAST
    if not (folder / OUTCOME).is_file():
        return ANEW
    own = f"{OUTCOME} and {CHECKPOINTS}/{LAST}" if os.path.lexists(last) else OUTCOME
    return (
        f"restore it, or choose another hydra.run.dir; to replace that run by a new one, remove {own} from it"
    )


def best_remedy(folder: Path, same: bool) -> str:
    """What to do where the best checkpoint that `last.ckpt` of the run in `folder` names is of no use.

    `same`: whether the two are of one step, and thus of one content.
    """
    last = folder / CHECKPOINTS / LAST
    if same:
        return f"copy {last} there, which is of the same step"
    if (folder / OUTCOME).is_file():
        return last_remedy(folder)
    return f"restore it, or remove {last}, which names it, to start training again"


def write_outcome(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Write `outcome.json`, whose presence marks a run as finished."""
    write_json(folder / OUTCOME, outcome)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run in `folder` for this command; InputError while another one is at work there.

    Of several processes of a command the first one holds it.
    """
    if not launch().first:
        yield
        return
    until = time.monotonic() + PATIENCE
    while True:
        with file_lock(folder / LOCK) as held:
            if held:
                for left in folder.glob(f".{POLICY}.????????"):  # of a command that was killed
                    shutil.rmtree(left, ignore_errors=True)
                yield
                return
        if time.monotonic() >= until:
            raise InputError(
                f"{folder}: another command is at work on this run: wait for its end, or choose another "
                "hydra.run.dir"
            )
        time.sleep(0.2)

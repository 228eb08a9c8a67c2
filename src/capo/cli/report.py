"""Write the calibration report: for `generate.py stage=report`, and before the first step of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor

from capo.data.candidates import Candidates, TrainingData
from capo.data.generation import ImageGenerator, PoolSpec, lacking, stages_of
from capo.data.labels import calibrated
from capo.data.pool import Pool, is_begun
from capo.data.pool.layout import REPORT
from capo.data.selection import Selection, select
from capo.errors import InputError
from capo.evaluation.reports.calibration_figures import CalibrationReport
from capo.evaluation.reports.calibration_page import print_report, write_report
from capo.evaluation.reports.calibration_report import calibration_report
from capo.pairs import Strategy
from capo.rewards import Reward
from capo.runtime.run_folder import CALIBRATION


def check_scored(spec: PoolSpec, generator: ImageGenerator, rewards: Sequence[Reward]) -> None:
    """Raise InputError that names the stage to run first if the pool lacks scores; creates nothing."""
    folder = spec.folder(generator.fingerprint)
    if not is_begun(folder):
        raise InputError(
            f"stage=report: there is no pool {folder} yet: run generate.py with the same values and "
            "stage=all first"
        )
    pool = Pool.open(folder)
    for stage in stages_of(pool, spec, generator, rewards, verify=False):
        if stage.todo():
            raise InputError(lacking(stage, "stage=report"))


def report_pool(data: TrainingData, strategy: Strategy, method: str, console: Console) -> Path:
    """Write the report of a scored pool to its folder `report`, print a summary, and return that folder.

    A pool without any usable pair gets a report, too. Raises InputError for scores that cannot be used and
    for a folder that cannot be written.
    """
    scores = data.scores()
    rewards = calibrated(scores, data.labels, method)
    report = _report(data, scores, rewards, select(strategy, scores, rewards), strategy, method)
    folder = data.pool.folder / REPORT
    warnings = write_report(
        folder, f"Calibration of {data.pool.folder.name}", report, {"calibration": method}
    )
    print_report(report, warnings, console)
    console.print(f"calibration report: {folder / 'calibration.html'}", soft_wrap=True)
    return folder


def report_run(
    data: TrainingData, candidates: Candidates, strategy: Strategy, method: str, run: Path
) -> list[str]:
    """Write the report of a run's training pairs to `run`/calibration; return its warnings."""
    report = _report(data, candidates.scores, candidates.calibrated, candidates.selection, strategy, method)
    return write_report(
        run / CALIBRATION, f"Calibration of {data.pool.folder.name}", report, {"calibration": method}
    )


def _report(
    data: TrainingData,
    scores: Tensor,
    calibrated: Tensor,
    selection: Selection,
    strategy: Strategy,
    method: str,
) -> CalibrationReport:
    texts = [prompt.text for prompt in data.prompts]
    return calibration_report(scores, calibrated, selection, data.labels, texts, method, strategy)

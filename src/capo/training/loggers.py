"""Log training curves: always to `metrics.csv` in the run directory, on request to TensorBoard or W&B too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from capo.data.watching import SECONDS
from capo.errors import DamagedFile
from capo.runtime.files import write_table
from capo.runtime.locks import file_lock
from capo.runtime.reading import cell, read_rows
from capo.runtime.run_folder import CURVES_REMEDY, METRICS, POOL_CURVES
from capo.training.wandb_run import WandbRun

FLUSH = 50  # rows collected in memory before the file is written


class CurvesFile(Logger):
    """Logger that writes `folder/metrics.csv`: one row per log call, one column per figure.

    A figure that was not logged in a row leaves its cell empty. Rows of an existing file are kept and new
    ones appended; the file is replaced atomically. When a run resumes, `drop_after` removes the rows that the
    interrupted run had logged after the step of its checkpoint.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / METRICS
        self.rows: list[dict[str, Any]] = _rows(self.path)
        self._unwritten = 0

    @property
    def name(self) -> str:
        """Empty: the file lies directly in the run directory."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file lies directly in the run directory."""
        return ""

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Do nothing: config.yaml in the run directory holds the hyperparameters."""

    def drop_after(self, step: int) -> None:
        """Remove the rows of steps after `step`, and write the file."""
        self.rows = [row for row in self.rows if cell(self.path, row, "step", int, CURVES_REMEDY) <= step]
        self._write()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; it stays in memory until `save` is called or FLUSH rows have been collected."""
        self.rows.append({**metrics, "step": step})
        self._unwritten += 1
        if self._unwritten >= FLUSH:
            self._write()

    @rank_zero_only
    def save(self) -> None:
        """Write the file if it lacks rows."""
        if self._unwritten:
            self._write()

    def finalize(self, status: str) -> None:
        """Write the file if it lacks rows, however training ended."""
        self.save()

    @rank_zero_only
    def log_pools(self, figures: Mapping[str, float]) -> None:
        """Append a row to `pools.csv`: figures of pools belong to no step, and a resumed run keeps them.

        Processes that fill one pool may have been given one folder; each adds its rows to the others'.
        """
        path = self.path.with_name(POOL_CURVES)
        with file_lock(path.with_name(f".{path.name}.lock"), wait=True):
            _write_rows(path, [*_rows(path), figures])

    def _write(self) -> None:
        _write_rows(self.path, self.rows)
        self._unwritten = 0


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, without empty cells; none if there is no file. Raises DamagedFile."""
    try:
        rows = read_rows(path, CURVES_REMEDY)
    except FileNotFoundError:
        return []
    return [{name: value for name, value in row.items() if value} for row in rows]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_table(path, sorted({name for row in rows for name in row}), rows)


def logged_step(folder: Path) -> int:
    """The last step in `folder/metrics.csv`, 0 if there is none."""
    path = folder / METRICS
    return max((cell(path, row, "step", int, CURVES_REMEDY) for row in _rows(path)), default=0)


def pool_seconds(folder: Path) -> float:
    """Seconds of the last row of `folder/pools.csv`, 0 if there is none.

    Raises DamagedFile if it is no number, and for a file of something else, to which rows would be added.
    """
    path = folder / POOL_CURVES
    rows = _rows(path)
    told = [row for row in rows if SECONDS in row]
    if rows and not told:
        remedy = "move it away, or choose another hydra.run.dir"
        raise DamagedFile(path, f"it has no column {SECONDS}, so no run has written it", remedy)
    return cell(path, told[-1], SECONDS, float, CURVES_REMEDY) if told else 0.0


def csv_logger(folder: str | Path) -> Logger:
    """Return a logger that writes `folder/metrics.csv`."""
    return CurvesFile(folder)


def tensorboard_logger(folder: str | Path) -> Logger:
    """Return a logger that writes to `folder/tensorboard/`; needs the extra `tensorboard`."""
    return TensorBoardLogger(folder, name="tensorboard", version="")


def wandb_logger(folder: str | Path, project: str, **options: Any) -> Logger:
    """Return a W&B logger, online, offline under `folder/wandb/`, or disabled (`wandb_mode`).

    An offline run prints one line that says how to upload it. `options` (entity, group, name, notes, ...) are
    passed to `wandb.init` and take precedence over the values of `RunIdentity`.
    """
    return WandbRun(folder, project, **options)

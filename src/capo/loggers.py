"""Where curves go: `metrics.csv` in the run directory always, TensorBoard or W&B beside it on request."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from capo.atomic import write_whole

FLUSH = 50  # rows between two writes of the file


class CurvesFile(Logger):
    """`folder/metrics.csv`: a row for each step that is logged, a column for each figure, empty where it was not.

    Rows of a file that is there are kept, and new ones are appended; the file is always whole. `drop_after` takes off what a
    run that was cut off had written beyond the step from which it goes on.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, object]] = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                self.rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        self._unwritten = 0

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: config.yaml has them."""

    def drop_after(self, step: int) -> None:
        """Keep the rows up to `step`."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        self._write()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A row, in memory until `save` or until there are FLUSH of them."""
        self.rows.append({**metrics, "step": step})
        self._unwritten += 1
        if self._unwritten >= FLUSH:
            self._write()

    @rank_zero_only
    def save(self) -> None:
        """Write what is not written yet."""
        if self._unwritten:
            self._write()

    def finalize(self, status: str) -> None:
        self.save()

    def _write(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, sorted({name for row in self.rows for name in row}), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_whole(self.path, text.getvalue())
        self._unwritten = 0


def csv_logger(folder: str | Path) -> Logger:
    """`folder/metrics.csv`."""
    return CurvesFile(folder)


def tensorboard_logger(folder: str | Path) -> Logger:
    """`folder/tensorboard/`; needs the extra `tensorboard`."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="tensorboard", version="")


def wandb_is_online() -> bool:
    """Whether a run may go to the server: a key is found, and WANDB_MODE does not say otherwise."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode:
        return mode == "online"
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def wandb_logger(folder: str | Path, project: str, **options) -> Logger:
    """A W&B run, online where `wandb_is_online`, else offline under `folder/wandb/`, which one line says."""
    from lightning.pytorch.loggers import WandbLogger

    online = wandb_is_online()
    if not online:
        print(f"W&B: offline (no key, or WANDB_MODE says so); `wandb sync {folder}/wandb/offline-*` uploads the run")
    return WandbLogger(project=project, save_dir=str(folder), offline=not online, **options)

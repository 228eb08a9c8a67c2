"""Log training curves: always to `metrics.csv` in the run directory, on request to TensorBoard or W&B too."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from capo.data.watching import SECONDS
from capo.module import PreferenceModule
from capo.runtime.files import write_table, write_whole
from capo.runtime.locks import file_lock
from capo.runtime.reading import cell, read_json, read_rows
from capo.runtime.run_folder import CURVES_REMEDY, METRICS, POOL_CURVES

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
    """Seconds of the last row of `folder/pools.csv`, 0 if there is none; DamagedFile if it is no number."""
    path = folder / POOL_CURVES
    told = [row for row in _rows(path) if SECONDS in row]
    return cell(path, told[-1], SECONDS, float, CURVES_REMEDY) if told else 0.0


def csv_logger(folder: str | Path) -> Logger:
    """Return a logger that writes `folder/metrics.csv`."""
    return CurvesFile(folder)


def tensorboard_logger(folder: str | Path) -> Logger:
    """Return a logger that writes to `folder/tensorboard/`; needs the extra `tensorboard`."""
    return TensorBoardLogger(folder, name="tensorboard", version="")


def log_picture(loggers: Sequence[Logger], name: str, path: Path, step: int) -> None:
    """Send the image at `path` to the W&B and TensorBoard loggers under the tag `name`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as image:
                logger.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


@dataclass(frozen=True)
class RunIdentity:
    """Facts by which experiment trackers find and group a run.

    Attributes:
        axes: settings that are often swept, as a flat mapping of objective, beta, bias, pairs, rewards,
            model, lr, seed.
        config: the whole configuration, as in `config.yaml`.
        group: name of the sweep that the run is a job of, or None.
        tags: names of the objective, pairs strategy, model and rewards.
        job_type: W&B's job type.
    """

    axes: Mapping[str, Any]
    config: Mapping[str, Any]
    group: str | None = None
    tags: Sequence[str] = ()
    job_type: str = "train"


class WandbRun(WandbLogger):
    """W&B logger with one W&B run per run directory: a resumed run keeps its id, and `close` ends it.

    `folder/wandb.json` repeats id, group, job_type, tags, config and summary, so that they can be read
    without the W&B server.
    """

    def __init__(self, folder: str | Path, project: str, **options: Any):
        super().__init__(project=project, save_dir=str(folder))
        self.record_path, self._options = Path(folder) / "wandb.json", options
        self._record: dict[str, Any] = {}
        self._pool_figures: set[str] = set()  # whose axis W&B knows

    def begin(self, identity: RunIdentity) -> None:
        """Start a W&B run, or resume the one whose id `wandb.json` holds."""
        import wandb

        online = wandb_is_online()
        if not online:
            print(
                "W&B: offline (no API key found, or set by WANDB_MODE); "
                f"`wandb sync {self.save_dir}/wandb/offline-*` uploads the run"
            )
        try:
            before = read_json(self.record_path, "restore it, or remove it: the run then gets another id")
        except FileNotFoundError:
            before = {}
        self._record = {
            "id": before.get("id") or secrets.token_hex(4),
            "group": identity.group,
            "job_type": identity.job_type,
            "tags": list(identity.tags),
            "config": {**identity.axes, "run": identity.config},
            "summary": before.get("summary", {}),
        }
        # before the server is contacted: if this process ends early, the next one resumes under the same id
        self._write()
        given = {key: self._record[key] for key in ("id", "group", "job_type", "tags", "config")}
        if not online:
            given["settings"] = wandb.Settings(silent=True)  # the line printed above says it
        self._experiment = wandb.init(
            project=self.name,
            dir=self.save_dir,
            mode="online" if online else "offline",
            resume="allow",
            reinit="create_new",
            **(given | self._options),
        )
        self._experiment.define_metric("trainer/global_step")
        self._experiment.define_metric("*", step_metric="trainer/global_step")

    def log_pools(self, figures: Mapping[str, float]) -> None:
        """Log a row of figures of pools, drawn over seconds: they are from before the first step."""
        for name in figures.keys() - self._pool_figures:
            self._pool_figures.add(name)
            self.experiment.define_metric(name, step_metric=None if name == SECONDS else SECONDS)
        self.experiment.log(dict(figures))

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Record the final figures: as W&B summary values, as a table `outcome`, and in `wandb.json`."""
        self._record["summary"] = dict(figures)
        self.log_table(
            "outcome",
            columns=["figure", "value"],
            data=[[name, float(value)] for name, value in figures.items()],
        )
        self.experiment.summary.update(dict(figures))
        self._write()

    def close(self) -> None:
        """Finish the W&B run, so that this process can start another one."""
        if self._experiment is not None:
            self._experiment.finish()

    def _write(self) -> None:
        write_whole(self.record_path, json.dumps(self._record, indent=2) + "\n")


def wandb_is_online() -> bool:
    """Whether runs go to the W&B server: WANDB_MODE decides if it is set, else the presence of an API key."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode:
        return mode == "online"
    os.environ.pop("WANDB_MODE", None)  # wandb would refuse the empty string as an unknown mode
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def wandb_logger(folder: str | Path, project: str, **options: Any) -> Logger:
    """Return a W&B logger, online if `wandb_is_online()`, else offline under `folder/wandb/`.

    An offline run prints one line that says how to upload it. `options` (entity, group, name, notes, ...) are
    passed to `wandb.init` and take precedence over the values of `RunIdentity`.
    """
    return WandbRun(folder, project, **options)


class Curves(L.Callback):
    """Log the training figures every `every` optimizer steps, before the checkpoint of that step is written.

    A row holds means over the steps since the last one. Lightning itself logs after the checkpoint, so a run
    resumed from that checkpoint would lack a row. `time/pairs_per_second` is of the wall time between two
    rows, loader and checkpoints included, less what `paused` has added: the seconds, since training began,
    that were spent on something else (validation). `shown` is called with the loss of each row.
    """

    def __init__(
        self,
        every: int,
        paused: Callable[[], float] = float,
        shown: Callable[[float], object] = lambda loss: None,
    ):
        self.every, self.paused, self.shown = every, paused, shown
        self._seen, self._pairs, self._began = 0, 0, 0.0

    def _clock(self) -> float:
        return time.perf_counter() - self.paused()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count optimizer steps from the one at which training starts or resumes."""
        self._seen, self._pairs, self._began = trainer.global_step, 0, self._clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: PreferenceModule, outputs, batch, index: int
    ) -> None:
        """Count pairs; log the figures of the steps since the last row once its last micro-batch is done."""
        self._pairs += len(batch.prompt_ids) // batch.times * trainer.world_size
        step = trainer.global_step
        if step == self._seen or step % self.every:
            return
        figures = module.take_figures(of_all=True)  # which waits for the device, so that the time is right
        now = self._clock()
        figures["time/pairs_per_second"] = self._pairs / (now - self._began)
        self._seen, self._pairs, self._began = step, 0, now
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        self.shown(figures["train/loss"])

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """Write the logged rows to disk before the checkpoint."""
        for logger in trainer.loggers:
            logger.save()

"""Where curves go: `metrics.csv` in the run directory always, TensorBoard or W&B beside it on request."""

from __future__ import annotations

import csv
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from capo.runtime.files import write_table, write_whole

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
                self.rows = [
                    {name: value for name, value in row.items() if value} for row in csv.DictReader(file)
                ]
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
        write_table(self.path, sorted({name for row in self.rows for name in row}), self.rows)
        self._unwritten = 0


def csv_logger(folder: str | Path) -> Logger:
    """`folder/metrics.csv`."""
    return CurvesFile(folder)


def tensorboard_logger(folder: str | Path) -> Logger:
    """`folder/tensorboard/`; needs the extra `tensorboard`."""
    return TensorBoardLogger(folder, name="tensorboard", version="")


def log_picture(loggers: Sequence[Logger], name: str, path: Path, step: int) -> None:
    """The picture at `path` to every logger that shows pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as image:
                logger.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


@dataclass(frozen=True)
class RunIdentity:
    """How a run is found among others.

    Attributes:
        axes: what people sweep, flat: objective, beta, bias, pairs, rewards, model, lr, seed.
        config: everything that was configured, as `config.yaml` holds it.
        group: the sweep that it is a job of, or None.
        tags: objective, pairs, model, rewards.
    """

    axes: Mapping[str, object]
    config: Mapping[str, object]
    group: str | None = None
    tags: Sequence[str] = ()
    job_type: str = "train"


class WandbRun(WandbLogger):
    """One W&B run for one run directory: the same id whenever it goes on, ended by `close`.

    `folder/wandb.json` holds id, group, job_type, tags, config and summary for whoever has not the server.
    """

    def __init__(self, folder: str | Path, project: str, **options: object):
        super().__init__(project=project, save_dir=str(folder))
        self.record_path, self._options = Path(folder) / "wandb.json", options
        self._record: dict[str, object] = {}

    def begin(self, identity: RunIdentity) -> None:
        """Start the run, or go on with the one whose id `wandb.json` holds."""
        import wandb

        online = wandb_is_online()
        if not online:
            print(
                f"W&B: offline (no key, or WANDB_MODE says so); `wandb sync {self.save_dir}/wandb/offline-*` uploads the run"
            )
        before = (
            json.loads(self.record_path.read_text(encoding="utf-8")) if self.record_path.is_file() else {}
        )
        self._record = {
            "id": before.get("id") or secrets.token_hex(4),
            "group": identity.group,
            "job_type": identity.job_type,
            "tags": list(identity.tags),
            "config": {**identity.axes, "run": identity.config},
            "summary": before.get("summary", {}),
        }
        self._write()  # before the server hears of it: whatever ends this process, the next one goes on with this id
        given = {key: self._record[key] for key in ("id", "group", "job_type", "tags", "config")}
        if not online:
            given["settings"] = wandb.Settings(silent=True)  # the line above has said it all
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

    def summarize(self, figures: Mapping[str, float]) -> None:
        """The run's outcome: as summaries, as a table `outcome`, and in `wandb.json`."""
        self._record["summary"] = dict(figures)
        self.log_table(
            "outcome",
            columns=["figure", "value"],
            data=[[name, float(value)] for name, value in figures.items()],
        )
        self.experiment.summary.update(dict(figures))
        self._write()

    def close(self) -> None:
        """End the run, so that the next one of this process is another."""
        if self._experiment is not None:
            self._experiment.finish()

    def _write(self) -> None:
        write_whole(self.record_path, json.dumps(self._record, indent=2) + "\n")


def wandb_is_online() -> bool:
    """Whether a run may go to the server: a key is found, and WANDB_MODE does not say otherwise."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode:
        return mode == "online"
    os.environ.pop(
        "WANDB_MODE", None
    )  # set to nothing it says nothing, but wandb would take it for a mode that it does not know
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def wandb_logger(folder: str | Path, project: str, **options: object) -> Logger:
    """A W&B run, online where `wandb_is_online`, else offline under `folder/wandb/`, which one line says.

    `options` go to `wandb.init` and win over what the run says of itself: entity, group, name, notes ...
    """
    return WandbRun(folder, project, **options)


class Curves(L.Callback):
    """Hands the figures of a step to the loggers, every `every` steps, before the step's checkpoint is written.

    Lightning's own logging comes after the checkpoint: a run that goes on from there would lack a row.
    """

    def __init__(self, every: int):
        self.every, self._seen, self._pairs, self._began = every, 0, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, index: int) -> None:
        if self._pairs == 0:
            self._began = time.perf_counter()
        self._pairs += len(batch.prompt_ids) * trainer.world_size

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int
    ) -> None:
        """Nothing until the optimizer has moved."""
        step = trainer.global_step
        if step == self._seen:
            return
        seconds, pairs = time.perf_counter() - self._began, self._pairs
        self._seen, self._pairs = step, 0
        logged = step % self.every == 0
        figures = module.take_figures(of_all=logged) | {"time/pairs_per_second": pairs / seconds}
        if logged:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """What was logged is on the disk before the checkpoint that comes after it."""
        for logger in trainer.loggers:
            logger.save()

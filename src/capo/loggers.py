"""Where curves go: `metrics.csv` in the run directory always, TensorBoard or W&B beside it on request."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger


def csv_logger(folder: str | Path) -> Logger:
    """`folder/metrics.csv`."""
    return CSVLogger(folder, name="", version="", flush_logs_every_n_steps=50)


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

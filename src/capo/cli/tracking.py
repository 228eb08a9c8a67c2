"""Experiment trackers of a command: their loggers, begun with its identity and closed at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from capo.cli.build import built, target_name
from capo.cli.figures import found_figures
from capo.cli.values import plain
from capo.errors import InputError, first_line
from capo.runtime.launch import launch
from capo.training.loggers import CurvesFile
from capo.training.trackers import Tracker
from capo.training.wandb_run import RunIdentity

TRAIN, GENERATE = "train", "generate"  # W&B's job types


def identity_of(cfg: DictConfig, group: str | None, job_type: str = TRAIN) -> RunIdentity:
    """Identity of the run for experiment trackers: swept settings, tags, and its sweep `group`."""
    objective, pairs, rewards = target_name(cfg.objective), target_name(cfg.pairs), sorted(cfg.rewards)
    axes = {
        "objective": objective,
        "beta": cfg.objective.get("beta"),
        "bias": cfg.noise.bias,
        "pairs": pairs,
        "rewards": "+".join(rewards),
        "model": cfg.model.name,
        "lr": cfg.trainer.lr,
        "seed": cfg.seed,
    }
    tags = [objective, pairs, cfg.model.name, *rewards]
    return RunIdentity(axes, plain(cfg), group, tags, job_type)


@contextmanager
def trackers(
    cfg: DictConfig, group: str | None, folder: Path, job_type: str = TRAIN
) -> Iterator[list[Logger]]:
    """Yield the loggers; only the first process has any.

    Experiment trackers among them get the run's identity at the start and its figures at the end, and are
    closed. InputError for one that cannot begin; one that fails later costs nothing but its curves.
    """
    named = cfg.logger if launch().first else ()
    loggers: list[Logger] = [_made(cfg, f"logger.{name}") for name in named]
    tracking = [logger for logger in loggers if isinstance(logger, Tracker)]
    try:
        for logger in tracking:
            logger.begin(identity_of(cfg, group, job_type))
        yield loggers
        if figures := found_figures(folder):  # of a run; a pool has none
            for logger in tracking:
                logger.summarize(figures)
    finally:
        for logger in tracking:
            logger.close()


def _made(cfg: DictConfig, key: str) -> CurvesFile | Tracker:
    try:
        logger = built(cfg, key)
    except InputError:
        raise
    except Exception as error:  # of the user's own class, or of another program's
        told = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{key} cannot be made ({told}): check its arguments") from error
    if not isinstance(logger, Logger):
        raise InputError(
            f"{key} makes {logger!r}, which is no logger of Lightning (lightning.pytorch.loggers)"
        )
    return logger if isinstance(logger, CurvesFile) else Tracker(logger, key)

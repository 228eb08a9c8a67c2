"""Experiment trackers of other programs: tried before any work, and never what ends a run after that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from capo.errors import InputError, first_line
from capo.training.wandb_run import RunIdentity, WandbRun

LONGEST = 300  # letters of what another program raised
REMEDIES: dict[type[Logger], str] = {
    WandbRun: "check WANDB_API_KEY, {key}.project and its other options, or set WANDB_MODE=offline",
    TensorBoardLogger: "check {key}.folder, and the package: pip install 'capo[tensorboard]'",
}
log = logging.getLogger(__name__)


class Tracker(Logger):
    """A logger whose failures cost no run, once it has begun.

    The first one is told in a warning, and nothing more is sent to it.

    Args:
        logger: a logger of Lightning.
        key: its key in the configuration, for messages.
    """

    def __init__(self, logger: Logger, key: str):
        super().__init__()
        self.logger, self.key, self.failed = logger, key, False

    def begin(self, identity: RunIdentity) -> None:
        """Let it write for the first time; InputError if it cannot."""
        try:
            if isinstance(self.logger, WandbRun):
                self.logger.begin(identity)
            else:
                getattr(self.logger, "experiment", None)  # is made when it is first asked for
        except InputError:
            raise
        except Exception as error:  # other programs raise anything
            told = [told for kind, told in REMEDIES.items() if isinstance(self.logger, kind)]
            remedy = told[0].format(key=self.key) if told else "check its arguments"
            raise InputError(
                f"{self.key}: {type(self.logger).__name__} cannot begin ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:LONGEST] or 'no message'}): {remedy}, or choose logger=csv"
            ) from error

    def _send(self, send: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            send()
        except Exception as error:
            self.failed = True
            log.warning(
                "%s: %s failed (%s: %s); the run goes on without it",
                self.key,
                type(self.logger).__name__,
                type(error).__name__,
                first_line(error),
            )

    @property
    def name(self) -> str | None:
        """The logger's own."""
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        """The logger's own."""
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        """The logger's own."""
        return self.logger.save_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send a row of figures."""
        self._send(lambda: self.logger.log_metrics(dict(metrics), step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's identity has the whole configuration."""

    def log_pools(self, figures: Mapping[str, float]) -> None:
        """Send a row of figures of pools, if it takes them."""
        if isinstance(logger := self.logger, WandbRun):
            self._send(lambda: logger.log_pools(figures))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Send the image at `path` under the tag `name`, if it takes images."""
        if isinstance(logger := self.logger, WandbLogger):
            self._send(lambda: logger.log_image(name, [str(path)], step=step))
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._send(lambda: logger.experiment.add_image(name, pixels, step, dataformats="HWC"))

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Send the final figures, if it takes them."""
        if isinstance(logger := self.logger, WandbRun):
            self._send(lambda: logger.summarize(figures))

    def save(self) -> None:
        """Let it write what it holds."""
        self._send(self.logger.save)

    def finalize(self, status: str) -> None:
        """Tell it that training has ended."""
        self._send(lambda: self.logger.finalize(status))

    def close(self) -> None:
        """End it, also after a failure."""
        if isinstance(self.logger, WandbRun):
            failed, self.failed = self.failed, False
            self._send(self.logger.close)
            self.failed |= failed


def log_picture(loggers: Sequence[Logger], name: str, path: Path, step: int) -> None:
    """Send the image at `path` to the trackers among the loggers under the tag `name`."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.log_picture(name, path, step)

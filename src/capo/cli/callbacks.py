"""Hydra callbacks of conf/train.yaml.

Every start imports this module, so each callback imports its libraries when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Report on a multirun of train.py at its end (`capo.cli.sweep`).

    Ends the process with exit code 1 where a job has failed or is unfinished.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Write the tables and pages of the sweep's directory."""
        from capo.cli.sweep import report_sweep

        if not report_sweep(Path(config.hydra.sweep.dir), bool(config.plan)):
            raise SystemExit(1)


class SoupOfRewards(Callback):
    """Merge a multirun's policies of single rewards at its end, before its report (`capo.cli.sweep_soup`).

    Args:
        method: `slerp` or `linear`.
        trust: exact names of other code in swept values, which the jobs' config.yaml may then call.
    """

    def __init__(self, method: str = "slerp", trust: Sequence[str] = ()):
        self.method, self.trust = method, trust

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Write and evaluate the soups, each in a directory beside the jobs'."""
        from capo.cli.sweep_soup import add_soups

        if not config.plan:
            add_soups(Path(config.hydra.sweep.dir), self.method, config, self.trust)

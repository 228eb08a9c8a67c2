"""Hydra callbacks of conf/train.yaml.

Every start imports this module, so each callback imports its libraries when it is called.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


def _succeeds(task: Callable[[], object], what: str) -> bool:
    """Whether `task` succeeds; what fails is told. Hydra would warn, and end with exit code 0."""
    from capo.cli.messages import told_fault
    from capo.runtime.terminal import printable

    try:
        task()
    except Exception as error:
        told = told_fault(error) or "".join(traceback.format_exception(error)).rstrip()
        print(
            printable(f"error: {what} cannot be made, but the jobs' own results are there: {told}"),
            file=sys.stderr,
        )
        return False
    return True


class OwnPlaces(Callback):
    """Refuse output directories of which a part that Hydra writes leads elsewhere: it writes before a job.

    Hydra follows such links, and whoever made a directory of a run has chosen where they lead.
    """

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        """Check the directory of the output, and of an evaluated run the folders that are written to."""
        from capo.cli.hydra_record import remember
        from capo.cli.messages import plain_errors
        from capo.cli.places import check_output

        with plain_errors():
            check_output(config)
            if config.hydra.output_subdir:
                remember(Path(config.hydra.run.dir, config.hydra.output_subdir))

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Check the sweep's directory, and those of jobs that it holds."""
        from capo.cli.messages import plain_errors
        from capo.cli.places import check_sweep_output

        with plain_errors():
            check_sweep_output(config)


class SweepReport(Callback):
    """Report on a multirun of train.py at its end (`capo.cli.sweep`).

    Ends the process with exit code 1 where a job has failed or is unfinished, and where a report cannot be
    made.
    """

    lacking: ClassVar[list[str]] = []  # what callbacks before the report could not make

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Write the tables and pages of the sweep's directory."""
        from capo.cli.sweep import report_sweep

        folder, done = Path(config.hydra.sweep.dir), []
        made = _succeeds(
            lambda: done.append(report_sweep(folder, bool(config.get("plan")))), f"the report of {folder}"
        )
        lacking = bool(self.lacking)
        self.lacking.clear()
        if lacking or not (made and all(done)):
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

        folder = Path(config.hydra.sweep.dir)
        if config.get("plan"):
            return
        what = f"the soups of {folder}"
        if not _succeeds(lambda: add_soups(folder, self.method, config, self.trust), what):
            SweepReport.lacking.append(what)

"""The progress bar of training, which counts optimizer steps, and the time that is left of the run."""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from capo.data.rounds import validations
from capo.runtime.outlook import SETTLED, TRAINING, VALIDATION, Outlook


class Pace:
    """Tells an outlook how far training is, how long a pair takes, and a validation.

    Args:
        outlook: what is left of the run.
        batch: pairs of an optimizer step.
        every: optimizer steps between two validations.
        more: validations after the last step.
        rounds: steps of a round, which ends with a validation; None: there are no rounds.
        steps: steps of all rounds together; None: those of the trainer.
    """

    def __init__(
        self,
        outlook: Outlook,
        batch: int,
        every: int,
        more: int = 0,
        rounds: int | None = None,
        steps: int | None = None,
    ):
        self.outlook, self._batch, self._every, self._more = outlook, batch, every, more
        self._rounds, self.steps = rounds, steps
        self._first, self._began, self._validated = 0, 0.0, (0, 0.0)

    def begin(self, step: int, validating: float) -> None:
        """Begin at `step`, after `validating` seconds of validation by this process."""
        self._first, self._began, self._validated = step, time.monotonic() - validating, (0, validating)

    def at(self, step: int, last: int, validating: float) -> None:
        """Tell that `step` of `last` steps are done, and `validating` seconds of validation."""
        last = self.steps or last
        spent = time.monotonic() - self._began - validating
        self.outlook.left[TRAINING, TRAINING] = float((last - step) * self._batch)
        if spent >= SETTLED and step > self._first:
            self.outlook.measured(TRAINING, spent / ((step - self._first) * self._batch))
        count, before = self._validated
        if validating > before:
            self._validated = count + 1, validating
            units = validations(step, last, self._every, self._rounds) + self._more
            self.outlook.replace(VALIDATION, units, validating / (count + 1))


class StepBar(ProgressBar):
    """Bar from 0 to the optimizer steps of the run, shown by the first process.

    Lightning's own bar counts micro-batches, and reads the loss from the device after each of them. This one
    shows the loss of the last row of the curves (`show`), which was read for them, and the time that is left
    of the whole run by its `pace`, which learns the steps and the seconds of `validating`.
    """

    def __init__(self, pace: Pace | None = None, validating: Callable[[], float] = float) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._enabled = True
        self._pace, self._validating = pace, validating

    @property
    def is_enabled(self) -> bool:
        """Whether this process shows the bar."""
        return self._enabled

    def disable(self) -> None:
        """Show no bar: Lightning calls this on other processes than the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin at the step at which training starts or resumes."""
        if self._pace:
            self._pace.begin(trainer.global_step, self._validating())
        self._bar = tqdm(
            total=(self._pace and self._pace.steps) or trainer.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not self._enabled,
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args) -> None:
        """Advance after the last micro-batch of an optimizer step."""
        if self._bar is not None and trainer.global_step > self._bar.n:
            self._bar.update(trainer.global_step - self._bar.n)
            if self._pace:
                self._pace.at(trainer.global_step, trainer.max_steps, self._validating())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def show(self, loss: float) -> None:
        """Show a loss beside the bar."""
        if self._bar is not None:
            left = self._pace.outlook.note() if self._pace else ""
            self._bar.set_postfix_str(f"loss {loss:.4g}{', ' if left else ''}{left}", refresh=False)

    def print(self, *args, **options) -> None:
        """Print a line above the bar."""
        if self._enabled:
            tqdm.write(" ".join(map(str, args)))

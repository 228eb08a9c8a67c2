"""The progress bar of training, which counts optimizer steps."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class StepBar(ProgressBar):
    """Bar from 0 to `trainer.max_steps` optimizer steps, shown by the first process.

    Lightning's own bar counts micro-batches, and reads the loss from the device after each of them. This one
    shows the loss of the last row of the curves (`show`), which was read for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._enabled = True

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
        self._bar = tqdm(
            total=trainer.max_steps,
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

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def show(self, loss: float) -> None:
        """Show a loss beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)

    def print(self, *args, **options) -> None:
        """Print a line above the bar."""
        if self._enabled:
            tqdm.write(" ".join(map(str, args)))

"""What is recorded of each round of training, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from capo.data.rounds import Round
from capo.runtime.run_folder import MONITOR

Row = Mapping[str, Any]


class RoundRecord(L.Callback):
    """Keeps a row of each round that has ended: what is told of it, and its last win-rates on validation.

    The rows are in each checkpoint, so that those of a resumed run are complete.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._current: Row = {}

    def begin(self, part: Round, facts: Row) -> None:
        """Begin a round of which `facts` are known, as plain values."""
        self._current = {"round": part.number, "first step": part.first + 1, "last step": part.last, **facts}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int
    ) -> None:
        """After the last step of the round, which has just been validated, add its row."""
        if trainer.global_step != trainer.max_steps:
            return
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rates = {name: value for name, value in found.items() if name.startswith(MONITOR)}
        # a round that ended early, in a run of fewer steps, has a row already
        earlier = [row for row in self.rows if row["round"] < self._current["round"]]
        self.rows = [*earlier, {**self._current, **rates}]

    def state_dict(self) -> dict[str, Any]:
        """The rows, for a checkpoint."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of a checkpoint."""
        self.rows = state_dict["rows"]

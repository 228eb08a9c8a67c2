"""Checkpoints of a run: when they are written, that they are whole, and how a run goes on from one."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from capo.errors import InputError
from capo.module import PreferenceModule
from capo.runtime.files import write_whole
from capo.training.validation import WinRateValidation


class ValidatedCheckpoint(ModelCheckpoint):
    """A checkpoint after each validation, the one after the last step included."""

    def __init__(self, validation: WinRateValidation, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._validation = validation

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int
    ) -> None:
        if self._validation.validated == trainer.global_step:
            super().on_train_batch_end(trainer, module, outputs, batch, index)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name beside its own, syncs and renames."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        state = io.BytesIO()
        torch.save(checkpoint, state)
        write_whole(path, state.getbuffer())


class SameBatches(L.Callback):
    """Lets a run go on with another number of devices or another micro-batch.

    Lightning counts batches, of which a step may now have more or fewer: the count becomes that of as many steps.
    """

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        recount(progress, checkpoint["global_step"] * trainer.accumulate_grad_batches)


def recount(progress: dict[str, dict[str, int]], batches: int) -> None:
    """Shift all counts of a loop's progress so that `batches` were begun; how far the others lag behind stays."""
    for counts in (progress["total"], progress["current"]):
        shift = batches - counts["ready"]
        for name in ("ready", "started", "processed", "completed"):
            counts[name] += shift


def load_best(module: PreferenceModule, checkpoints: ModelCheckpoint) -> float:
    """Put a policy with the best checkpoint's weights in the module's place, whole and on the CPU; returns its win-rate.

    A new one, because what was trained may be compiled, or spread over devices.
    """
    state = torch.load(checkpoints.best_model_path, map_location="cpu", weights_only=True, mmap=True)
    module.policy = module.fresh_policy()
    kept = module.load_state_dict(state["state_dict"], strict=False)
    if kept.unexpected_keys or module.trained_names().intersection(kept.missing_keys):
        raise InputError(
            f"{checkpoints.best_model_path} holds the weights of another model: {[*kept.unexpected_keys, *kept.missing_keys][:3]}"
        )
    module.policy.eval().requires_grad_(False)
    return float(checkpoints.best_model_score)


def check_checkpoint(
    path: Path, module: nn.Module, names: Collection[str] | None = None, base: str | None = None
) -> None:
    """InputError where the checkpoint at `path` cannot be read or holds the weights of another model than `module`.

    `names`: what it has to hold of the module's state; None: all. `base`: fingerprint of the base that the run is tuned from. A run whose weights were exchanged under the same name would otherwise go on from none of its own.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored = checkpoint["state_dict"]
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); remove it, and training begins again"
        ) from error
    if base and checkpoint.get("base", base) != base:
        raise InputError(
            f"{path} was tuned from another base ({checkpoint['base'][:8]}, this is {base[:8]}): configure the weights of this run, "
            "or choose another hydra.run.dir"
        )
    own = {name: tensor for name, tensor in module.state_dict().items() if names is None or name in names}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if other := sorted(
        {name for name in own if shapes.get(name) != own[name].shape} | (shapes.keys() - own.keys())
    ):
        raise InputError(
            f"{path} is a checkpoint of another model ({len(other)} of {len(own)} tensors do not fit, the first {other[0]}); "
            "configure the model of this run, or choose another hydra.run.dir"
        )

"""Write, check and load the checkpoints of a training run."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from capo.backbones.averaging import AVERAGE, REFERENCE
from capo.backbones.networks import fresh_policy
from capo.errors import DamagedFile, InputError, load_reason
from capo.module import PreferenceModule
from capo.runtime.files import second_name, whole_file
from capo.runtime.reading import open_ordinary
from capo.runtime.run_folder import ANEW
from capo.training.validation import WinRateValidation

PROGRESS = {"loops": dict, "callbacks": dict, "optimizer_states": list}  # in a checkpoint, beside its weights


class ValidatedCheckpoint(ModelCheckpoint):
    """Save a checkpoint after each validation; the best one is the one that the validation chose.

    The last checkpoint is also saved every `every` optimizer steps, and when a single process is told to end
    (SIGTERM). Where best and last are of the same step, they are two names of one file. A best checkpoint is
    removed after the last one, which names the best, has been replaced. A run directory may have been moved
    since its last checkpoint: paths are taken from where it is now.
    """

    def __init__(self, validation: WinRateValidation, every: int | None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._validation, self._every, self._saved = validation, every, 0
        self._replaced: list[str] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int
    ) -> None:
        """Save a checkpoint if the policy was validated after this step, or the last one if it is due."""
        step, before = trainer.global_step, self._saved
        self._saved = step
        if self._validation.validated == step:
            super().on_train_batch_end(trainer, module, outputs, batch, index)
            while self._replaced:
                super()._remove_checkpoint(trainer, self._replaced.pop())
        elif self._told_to_end(trainer) or (step != before and self._every and step % self._every == 0):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @staticmethod
    def _told_to_end(trainer: L.Trainer) -> bool:
        # several processes would have to agree on the step
        return trainer.received_sigterm and trainer.world_size == 1

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether the policy validated last is the best so far (`capo.training.choice`)."""
        return self._validation.chosen

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Save a checkpoint; if this step has one, as the best, give that another name."""
        saved = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        if saved not in ("", filepath) and trainer.strategy.broadcast(
            trainer.is_global_zero and second_name(Path(saved), Path(filepath))
        ):
            return
        super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Note what is to be removed: a run that is killed meanwhile resumes from what names this file."""
        self._replaced.append(filepath)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore paths and win-rate of the best checkpoint, wherever the run directory is now."""
        here = Path(str(self.dirpath))
        state = {**state_dict, "dirpath": self.dirpath}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = str(here / Path(state[name]).name) if state[name] else ""
        state["best_k_models"] = {
            str(here / Path(path).name): score for path, score in state["best_k_models"].items()
        }
        super().load_state_dict(state)


def best_of(checkpoint: Mapping[str, Any]) -> str | None:
    """Name of the file with the best checkpoint when `checkpoint` was saved; None if there was none."""
    for state in checkpoint["callbacks"].values():
        if isinstance(state, dict) and isinstance(best := state.get("best_model_path"), str):
            return Path(best).name or None
    return None


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints atomically, and read them, without holding one in host memory.

    A file is written under a temporary name in the same folder, synced, then renamed.
    """

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        """Write `checkpoint`, one tensor after another. Raises InputError if the disk refuses it."""
        with whole_file(path) as unfinished, unfinished.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # in which torch hides what the file system said
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = None) -> dict[str, Any]:
        """Map the tensors of a checkpoint from its file; each is read when it is copied to its place."""
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


class SameBatches(L.Callback):
    """Resume a run with another number of devices or another micro-batch size.

    Lightning counts batches, and an optimizer step may now take more or fewer of them than before. When a
    checkpoint is loaded, its batch count is therefore recomputed from its number of optimizer steps.
    """

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """Replace the batch count by the checkpoint's steps times the batches that a step takes now."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        recount(progress, checkpoint["global_step"] * trainer.accumulate_grad_batches)


def recount(progress: dict[str, dict[str, int]], batches: int) -> None:
    """Shift all counts of a loop's progress so that "ready" is `batches`; their differences are kept."""
    for counts in (progress["total"], progress["current"]):
        shift = batches - counts["ready"]
        for name in ("ready", "started", "processed", "completed"):
            counts[name] += shift


def load_best(module: PreferenceModule, path: Path) -> dict[str, Tensor]:
    """Set `module.policy` to a new one with the weights of a checkpoint, unsharded and on the CPU.

    The policy is built anew because the trained one may be compiled or sharded over devices. If the run
    averages its weights, the averaged ones are loaded.

    Returns:
        The trained weights by their names in the module, mapped from the file.

    Raises:
        InputError: the checkpoint cannot be read, is of another run, or holds the weights of another model.
    """
    remedy = "evaluate the policy as it was exported, or train again"
    state = read_checkpoint(path, remedy)
    _check_run(state, module, path, remedy)
    weights = state["state_dict"] | state.get(AVERAGE, {})
    module.policy = fresh_policy(module.backbone, module.lora, module.execution)
    kept = module.load_state_dict(weights, strict=False)
    if kept.unexpected_keys or module.trained_names().intersection(kept.missing_keys):
        raise InputError(
            f"{path} holds the weights of another model; tensors that do not match: "
            f"{[*kept.unexpected_keys, *kept.missing_keys][:3]}; restore it, or {remedy}"
        )
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    module.policy.eval().requires_grad_(False)
    return {name: value for name, value in weights.items() if name in trained}


def read_checkpoint(path: Path, remedy: str) -> dict[str, Any]:
    """Read a checkpoint; its tensors are mapped from the file, whose checksums are compared.

    Raises DamagedFile, with `remedy`, for a file that is missing, damaged, or no checkpoint of a run.
    """
    try:
        with open_ordinary(path, partial(DamagedFile, remedy=remedy)) as file, zipfile.ZipFile(file) as parts:
            if damaged := parts.testzip():  # loading does not compare them
                raise DamagedFile(path, f"its part {damaged} was changed", remedy)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise DamagedFile(path, "it is not there", remedy) from error
    except (DamagedFile, MemoryError):
        raise
    except Exception as error:  # what zipfile, pickle and torch raise for damaged bytes has no common class
        raise DamagedFile(path, load_reason(error), remedy) from error
    if fault := _fault(checkpoint):
        raise DamagedFile(path, fault, remedy)
    return checkpoint


def _fault(checkpoint: object) -> str | None:
    """What a file lacks to be a checkpoint of a run, or None."""
    if not isinstance(checkpoint, dict):
        return "it holds no names with values"
    for name in ("state_dict", AVERAGE, REFERENCE):
        weights = checkpoint.get(name, {})
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            return f"{name} holds no tensors by name"
    if "state_dict" not in checkpoint:
        return "it has no state_dict"
    for name, kind in {"global_step": int, **PROGRESS}.items():
        if type(checkpoint.get(name)) is not kind:
            return f"{name} is {type(checkpoint.get(name)).__name__}, not {kind.__name__}"
    return next(
        (f"{name} is no text" for name in ("base", "run") if type(checkpoint.get(name, "")) is not str), None
    )


def _check_run(checkpoint: Mapping[str, Any], module: nn.Module, path: Path, remedy: str) -> None:
    """Raise InputError if checkpoint and module each know their run, and those differ."""
    run = getattr(module, "run", None)
    if run and checkpoint.get("run", run) != run:
        raise InputError(f"{path} is a checkpoint of another run than the one in its directory: {remedy}")


def check_checkpoint(
    path: Path,
    module: nn.Module,
    names: Collection[str] | None = None,
    base: str | None = None,
    remedy: str = ANEW,
) -> dict[str, Any]:
    """Check that the checkpoint at `path` can be read and fits `module`, before a run resumes from it.

    Args:
        path: the checkpoint file.
        module: the module that will load it.
        names: entries of the module's state dict that the checkpoint must hold; None: all of them.
        base: fingerprint of the base weights that this run tunes; None: not compared. It detects base weights
            that were replaced under the same name since the checkpoint was written.
        remedy: what to do where the file cannot be read.

    Returns:
        The checkpoint, whose tensors are mapped from the file.

    Raises:
        InputError: the checkpoint cannot be read, is of another run, was tuned from another base, or has
            other tensors.
    """
    checkpoint = read_checkpoint(path, remedy)
    _check_run(checkpoint, module, path, remedy)
    stored = checkpoint["state_dict"]
    if base and checkpoint.get("base", base) != base:
        raise InputError(
            f"{path} was tuned from another base (fingerprint {checkpoint['base'][:8]}, configured is "
            f"{base[:8]}): configure the base weights of that run, or choose another hydra.run.dir"
        )
    own = {name: tensor for name, tensor in module.state_dict().items() if names is None or name in names}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if other := sorted(
        {name for name in own if shapes.get(name) != own[name].shape} | (shapes.keys() - own.keys())
    ):
        raise InputError(
            f"{path} is a checkpoint of another model ({len(other)} of {len(own)} tensors do not match, "
            f"the first is {other[0]}); configure the model of that run, or choose another hydra.run.dir"
        )
    return checkpoint

"""Train a policy with Lightning, from the last checkpoint if there is one."""

from __future__ import annotations

import gc
import os
import signal as signals
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGUSR1
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor

from capo.backbones import Backbone
from capo.errors import InputError, first_line
from capo.module import PreferenceModule
from capo.runtime.launch import AUTO, Launch, cluster, device_count, launch
from capo.runtime.memory import memory_of, ran_out
from capo.runtime.processes import run_on_first_process
from capo.runtime.run_folder import CHECKPOINTS, LAST, MONITOR, best_remedy, last_remedy
from capo.training.checkpoints import (
    SameBatches,
    ValidatedCheckpoint,
    WholeCheckpoints,
    best_of,
    check_checkpoint,
)
from capo.training.curves import Curves
from capo.training.loader import PreferenceData
from capo.training.loggers import CurvesFile
from capo.training.progress import Pace, StepBar
from capo.training.rounds import RoundRecord
from capo.training.signal import GradientSignal
from capo.training.strategies import make_strategy
from capo.training.validation import WinRateValidation


def encode_aside(backbone: Backbone, prompts: list[str]) -> dict[str, Tensor]:
    """Text conditioning of B prompts, encoded on the CPU, where the text encoders are during training."""
    with backbone.visiting("cpu"):
        return backbone.encode_prompts(prompts)


def _own_devices(devices: int | str | Sequence[int], here: Launch) -> int | str | list[int]:
    """Devices for Lightning on this machine: one per process; only a single process may choose which one."""
    if here.world_size > 1:
        return here.local_world_size
    if device_count(devices) is None:
        return 1
    return devices if isinstance(devices, int | str) else list(devices)


def _plugins(here: Launch) -> list[Any]:
    """Plugins for Lightning: one whole file per checkpoint and, with several processes, their cluster."""
    return [WholeCheckpoints(), *([cluster()] if here.world_size > 1 else [])]


def trained_steps(folder: Path, module: PreferenceModule) -> int:
    """Optimizer steps that the run in `folder` has behind it, as its last checkpoint tells; 0 without one.

    Raises InputError if the checkpoint, or the best one that it names, cannot be read or is of another model
    than `module`.
    """
    last, base = folder / CHECKPOINTS / LAST, module.backbone.fingerprints["denoiser"]
    if not os.path.lexists(last):
        return 0
    names = module.trained_names()
    found = check_checkpoint(last, module, names, base, last_remedy(folder))
    step = found["global_step"]
    if name := best_of(found):  # it is exported at the end, unless a later one is better
        best = last.with_name(name)
        if not (best.exists() and best.samefile(last)):
            remedy = best_remedy(folder, same=name == f"{step:06d}.ckpt")
            check_checkpoint(best, module, names, base, remedy)
    return step


def _best_and_last(validation: WinRateValidation, folder: Path, every: int | None) -> ValidatedCheckpoint:
    """Callback that keeps the last checkpoint and the one with the highest validation win-rate."""
    return ValidatedCheckpoint(
        validation,
        every,
        folder / CHECKPOINTS,
        filename="{step:06d}",
        monitor=MONITOR,
        mode="max",
        save_top_k=1,
        save_last=True,
        every_n_train_steps=1,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )


@contextmanager
def ending_on(number: int) -> Iterator[None]:
    """Treat a signal as SIGTERM for the block; only the main thread can receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signals.signal(number, lambda *_: os.kill(os.getpid(), signals.SIGTERM))
    try:
        yield
    finally:
        signals.signal(number, before)


def out_of_memory(module: PreferenceModule, micro_batch: int, error: Exception) -> str:
    """Message for a training step that does not fit into memory, with what takes less."""
    less = [f"a smaller trainer.micro_batch (now {micro_batch})"] if micro_batch > 1 else []
    if not module.execution.gradient_checkpointing:
        less.append("trainer.gradient_checkpointing=true")
    if not module.lora:
        less.append("experiment=lora, or trainer=fsdp on several devices")
    return (
        f"training with {micro_batch} pairs in a forward pass does not fit into {memory_of(error)}: "
        f"{'; '.join(less) or 'use a device with more memory'}. The same command then resumes from the last "
        f"checkpoint ({first_line(error)})"
    )


def _run(trainer: L.Trainer, module: PreferenceModule, data: PreferenceData, checkpoint: Path | None) -> None:
    """Train with the base on the CPU; then free what steps needed, and move the base back."""
    home = module.backbone.device
    module.backbone.to("cpu")
    try:
        with ending_on(SIGUSR1):  # SLURM's warning before the time limit, with --signal=USR1@120
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, MemoryError) as error:  # torch's own error is a RuntimeError
        if isinstance(error, InputError) or not ran_out(error):
            raise
        raise InputError(out_of_memory(module, data.batch, error)) from error
    module.trainer = None
    module.policy.zero_grad(set_to_none=True)
    gc.collect()  # cycles hold the trainer, and with it the optimizer and the reference
    module.backbone.to(home)


def _trainer(
    here: Launch, devices: int | str | Sequence[int], strategy: str, precision: str, **options: Any
) -> L.Trainer:
    """Lightning's trainer for whole runs on this launch; `options` are its other arguments."""
    named: Any = precision  # one of the names that Lightning spells out as literals
    return L.Trainer(
        devices=_own_devices(devices, here),
        num_nodes=here.machines,
        strategy=make_strategy(strategy, here.world_size),
        precision=named,
        max_epochs=-1,
        plugins=_plugins(here),
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        **options,
    )


def _callbacks(
    validation: WinRateValidation,
    checkpoints: ValidatedCheckpoint,
    log_every: int,
    pace: Pace | None,
    record: RoundRecord | None,
) -> list[L.Callback]:
    bar = StepBar(pace, lambda: validation.seconds)
    return [
        Curves(log_every, lambda: validation.seconds, bar.show),
        validation.average,  # before the validation, which reads it
        validation,
        *([record] if record else []),  # of what the validation found
        checkpoints,
        SameBatches(),
        bar,
    ]


def _check_validated(checkpoints: ModelCheckpoint, max_steps: int) -> None:
    """Raise InputError if no validation took place, so that there is no best checkpoint."""
    if checkpoints.best_model_score is None:
        raise InputError(
            f"no validation took place in {max_steps} steps; "
            "set validation.every to at most trainer.max_steps"
        )


def _begun(folder: Path, module: PreferenceModule, loggers: Sequence[Logger], first: bool) -> Path | None:
    """The checkpoint that training resumes from, if there is one; later rows of the curves are dropped.

    Only the `first` process writes the curves. Raises InputError if the checkpoint is of another model.
    """
    last, step = folder / CHECKPOINTS / LAST, trained_steps(folder, module)
    for logger in loggers:
        if first and isinstance(logger, CurvesFile) and logger.rows:
            logger.drop_after(step)
    return last if os.path.lexists(last) else None


def fit(
    module: PreferenceModule,
    data: PreferenceData,
    validation: WinRateValidation,
    loggers: Sequence[Logger],
    folder: Path,
    *,
    max_steps: int,
    log_every: int,
    accelerator: str,
    precision: str,
    accumulate: int,
    devices: int | str | Sequence[int] = 1,
    strategy: str = AUTO,
    signal: GradientSignal | None = None,
    checkpoint_every: int | None = None,
    pace: Pace | None = None,
    record: RoundRecord | None = None,
    begin: Callable[[], object] = lambda: None,
) -> ModelCheckpoint:
    """Train for `max_steps` optimizer steps; keep the last checkpoint and the one with the best win-rate.

    Training resumes from `folder/checkpoints/last.ckpt` if that file exists. Weights, optimizer state, data
    order, visit numbers and curves then equal those of an uninterrupted run up to rounding, even if strategy
    or devices have changed. The backbone is moved to the CPU during training and back to its device
    afterwards; validation moves the parts that it needs to the device. `signal` measures the signal in the
    gradient; by default nothing does. `pace` tells an outlook how training goes. `record` keeps the win-rates
    at the end, which is then that of a round. The last checkpoint is saved after each validation, every
    `checkpoint_every` steps, and on SIGTERM or SIGUSR1, which end a single process. `begin` is called on the
    first process when what training resumes from has been checked.

    Returns:
        The checkpoint callback, which knows the best checkpoint and its validation win-rate.

    Raises:
        InputError: the last checkpoint does not fit the module, a step does not fit into the device's memory,
            or no validation took place.
    """
    here = launch()
    begun = _begun(folder, module, loggers, here.first)
    run_on_first_process(begin)
    checkpoints = _best_and_last(validation, folder, checkpoint_every)
    trainer = _trainer(
        here,
        devices,
        strategy,
        precision,
        accelerator=accelerator,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        logger=list(loggers),
        default_root_dir=folder,
        callbacks=[signal or GradientSignal(), *_callbacks(validation, checkpoints, log_every, pace, record)],
    )
    _run(trainer, module, data, begun)
    _check_validated(checkpoints, max_steps)
    return checkpoints

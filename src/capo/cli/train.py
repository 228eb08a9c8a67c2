"""Run train.py: a plan, a check, or a training run, after everything that can fail early has been checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from capo.cli.idle import check_idle
from capo.cli.messages import plain_errors
from capo.cli.places import check_place
from capo.cli.run_config import is_finished
from capo.cli.schema import check_group_choices, check_values
from capo.errors import InputError
from capo.runtime.imports import heavy_imports
from capo.runtime.launch import check_fsdp, check_launch, divide, launch
from capo.runtime.run_folder import CONFIG, best_win_rate
from capo.runtime.terminal import Terminal


def main(cfg: DictConfig) -> float:
    """Run `cfg`, alone or as a job of a sweep; return the best validation win-rate, else NaN."""
    own: Any = HydraConfig.get()  # typed as the schema, but a DictConfig
    with plain_errors():
        check_group_choices(cfg, own)
        if launch().world_size > 1:
            check_places(own)
        if own.mode is not RunMode.MULTIRUN:
            return run(cfg, given=own.overrides.task)
        check_sweep(own)
        from capo.cli.sweep import run_job, sweep_name

        return run_job(partial(run, cfg, sweep_name(Path(own.sweep.dir))), Path(cfg.run_dir))


def run(cfg: DictConfig, group: str | None = None, given: Sequence[str] = ()) -> float:
    """Do a training run, or what is missing of it; return the best validation win-rate.

    `group` names the sweep that the run is a job of; `given` are the overrides of a run that is none. With
    plan=true or check=true nothing is trained, and NaN is returned. Heavy libraries are imported where they
    are needed: a plan does without Lightning, and errors in the configuration are found before the import.
    """
    check_values(cfg)
    if not (Path(cfg.run_dir) / CONFIG).is_file():  # a run that has begun keeps its values
        check_idle(cfg, given)
    if cfg.plan and cfg.check:
        raise InputError(
            "plan=true check=true: a plan loads no weights, and a check does; give them one after the other"
        )
    if cfg.plan:
        with heavy_imports():
            from capo.cli.plan import run_plan

        if launch().first:
            run_plan(cfg, Terminal())
        return math.nan
    if cfg.check:
        return check(cfg)
    refuse_early(cfg)
    with heavy_imports():
        from capo.cli.tune import complete_run

    complete_run(cfg, group, Path(cfg.run_dir))
    return best_win_rate(Path(cfg.run_dir))


def check(cfg: DictConfig) -> float:
    """Check the model on this machine; return NaN, since nothing is trained."""
    if launch().world_size > 1:
        raise InputError(
            f"check=true measures one device, but {launch().world_size} processes were started: run it "
            "without the launcher"
        )
    with heavy_imports():
        from capo.cli.check import run_checks
        from capo.cli.parts import module_of

    run_checks(cfg, module_of, Terminal())
    return math.nan


def refuse_early(cfg: DictConfig) -> None:
    """Raise InputError if `cfg` cannot run, before weights load; of a finished run its launch and the hub."""
    with heavy_imports():
        from capo.cli.build import check_imported, moving_reference
        from capo.cli.online import check_reference
        from capo.cli.plan import require_room
        from capo.cli.readiness import check_loggers, check_ready, check_sharded_guidance
        from capo.runtime.hub import check_access
        from capo.runtime.optimizers import check_optimizer
        from capo.runtime.processes import check_devices

    check_place(Path(cfg.run_dir))
    trainer, finished = cfg.trainer, is_finished(Path(cfg.run_dir), cfg)
    if not finished:
        check_ready(cfg)
    if not (Path(cfg.run_dir) / CONFIG).is_file():
        check_reference(cfg)
    if cfg.push_to_hub:
        check_access(cfg.push_to_hub)
    check_launch(launch(), trainer.strategy, trainer.devices, trainer.num_nodes)
    moving = moving_reference(cfg) is not None
    check_fsdp(trainer.strategy, trainer.precision, trainer.optimizer, trainer.channels_last, moving)
    check_optimizer(trainer.optimizer)
    divide(trainer.batch, launch().world_size, trainer.micro_batch)
    if not finished:
        check_loggers(cfg)
        check_devices(trainer.accelerator, trainer.devices)
        check_sharded_guidance(cfg, launch().world_size)
        check_imported(cfg)
        require_room(cfg)


def check_sweep(own: DictConfig) -> None:
    """Raise InputError for places of a sweep's jobs at which its table would not find each of them."""
    subdir = str(OmegaConf.to_container(own.sweep, resolve=False)["subdir"])  # type: ignore[index]
    if own.output_subdir != ".hydra":
        raise InputError(
            f"hydra.output_subdir={own.output_subdir} with -m: the table of a sweep reads each job's .hydra; "
            "leave it out"
        )
    if "/" in str(own.sweep.subdir) or "${" not in subdir:
        raise InputError(
            f"hydra.sweep.subdir={subdir} with -m: each job needs a folder of its own there; leave it "
            "out, or give one name with ${hydra.job.num}"
        )


def check_places(own: DictConfig) -> None:
    """Raise InputError if several processes would each start a sweep or make a run directory of their own."""
    if own.mode is RunMode.MULTIRUN:
        raise InputError(
            f"-m with {launch().world_size} processes: each would start the whole sweep; run a sweep without "
            "the launcher, one process per job, or a single run on several devices without -m "
            "(docs/training.md)"
        )
    from capo.cli.process import check_common_folder

    check_common_folder(launch().world_size, own.overrides.hydra)

"""Set the threads of this process, and where its messages go."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from hydra.core.hydra_config import HydraConfig
from transformers.utils import logging as transformers_logging

from capo.errors import InputError
from capo.runtime.launch import launch
from capo.runtime.run_folder import WORKERS


def prepare_process(threads: int | None) -> int:
    """Set the number of torch threads and silence messages of other libraries; return the number of threads.

    If `threads` is None, the cores of this machine are divided by the number of processes that a launcher
    started on it. Without a launcher OMP_NUM_THREADS is used, if set; joblib gives each job of a sweep
    its share through it. Raises InputError for `threads` below 1.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # it always exists when a run resumes
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} must be at least 1; leave it out for all cores")
    torch.set_num_threads(thread_count(threads))
    return torch.get_num_threads()


def thread_count(threads: int | None) -> int:
    """Number of torch threads of this process for the key `threads`; see `prepare_process`."""
    if threads:
        return threads
    here, told = launch(), os.environ.get("OMP_NUM_THREADS", "")
    processes = here.local_world_size if here.world_size > 1 else int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if not processes and told.isdigit() and int(told) > 0:
        return int(told)
    return max(1, (os.cpu_count() or 1) // (processes or 1))


def check_common_folder(processes: int, overrides: Sequence[str]) -> None:
    """Raise InputError if several processes would each make an output directory of their own.

    `overrides` are Hydra's own on the command line.
    """
    if not any(override.startswith("hydra.run.dir=") for override in overrides):
        raise InputError(
            f"{processes} processes would each make a run directory: give them a common one, "
            "hydra.run.dir=DIR"
        )


def worker_logs() -> Path | None:
    """Folder for the logs of isolated rewards, in Hydra's output directory; None outside an entry script."""
    return Path(HydraConfig.get().runtime.output_dir) / WORKERS if HydraConfig.initialized() else None

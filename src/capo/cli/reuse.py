"""Reuse of the reference's errors by the runs on one pool, such as the jobs of a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console

from capo.cli.build import family_of, target_name
from capo.data.reference_errors import ReferenceErrors
from capo.data.stages import library_versions, model_of
from capo.module import PreferenceModule
from capo.runtime.processes import own_device

PLACES = ("weights", "revision", "variant", "vae", "vae_revision")  # content counts, in fingerprints


@contextmanager
def reused_reference(
    cfg: DictConfig, module: PreferenceModule, pool: Path, console: Console
) -> Iterator[None]:
    """Have the module take errors of the reference from the file in the folder `pool`, and add what it lacks.

    Nothing happens unless `trainer.reuse_reference` is set. Raises InputError if the file cannot be used.
    """
    if not cfg.trainer.reuse_reference:
        yield
        return
    if not module.needs.reference:
        console.print(f"objective={target_name(cfg.objective)} reads no reference: none is reused")
        yield
        return
    known = ReferenceErrors(pool, reference_settings(cfg, module))
    console.print(f"errors of the reference that are known: {known.described}", soft_wrap=True)
    module.known = known
    try:
        yield
    finally:
        module.known = None
        known.close()
    console.print(
        f"passes of the reference: {known.recalled} reused, {known.computed} made; known now: "
        f"{known.described}",
        soft_wrap=True,
    )


def reference_settings(cfg: DictConfig, module: PreferenceModule) -> dict[str, object]:
    """Everything on which the bits of the reference's errors depend, beside the samples of a batch."""
    backbone, execution = module.backbone, module.execution
    return {
        "reference": backbone.fingerprints["denoiser"],
        "backbone": {key: value for key, value in family_of(cfg)[1].items() if key not in PLACES},
        "schedule": backbone.sampler_identity(),
        "draw": cfg.noise.draw,
        "precision": execution.precision,
        "compile": execution.compile,
        "channels_last": execution.channels_last,
        "adapter": bool(module.lora),  # else the reference is a network of its own, whose weights are marked
        "half_frozen": bool(module.lora) and execution.half_frozen,
        "device": model_of(own_device(cfg.trainer.accelerator)),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        **library_versions(),
    }

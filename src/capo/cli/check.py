"""`check=true`: load the model, measure it on this machine, write `check.json` and a table; no run is begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
from capo.cli.build import base_of, built
from capo.cli.plan import request_of
from capo.cli.process import prepare_process
from capo.cli.readiness import check_accelerator, check_draw, check_weights
from capo.cli.values import check_values
from capo.errors import InputError
from capo.module import PreferenceModule
from capo.preflight.model_check import (
    PLACES,
    Check,
    check_denoising,
    check_sample,
    check_table,
    check_vae,
    denoising_at,
    write_checks,
)
from capo.preflight.plan import Request, make_plan
from capo.preflight.step_check import check_steps, step_batch, take_steps

CHECKS = "check.json"


def run_checks(
    cfg: DictConfig, module_of: Callable[[DictConfig, Backbone], PreferenceModule], console: Console
) -> list[Check]:
    """All checks of the configured model, on one device.

    Raises InputError for values or weights that cannot be used, and, after everything is written, where a check has failed.
    """
    check_values(cfg)
    check_weights(cfg)
    check_draw(cfg)
    check_accelerator(cfg)
    prepare_process(cfg.threads)
    torch.manual_seed(cfg.seed)
    folder = Path(cfg.run_dir)
    request = request_of(
        cfg, dict.fromkeys(("train", "validation", "test"))
    )  # before weights load: it refuses what no batch divides by
    backbone = base_of(cfg)
    known = built(cfg.model.known_images)
    vae, latents = check_vae(backbone, known)
    captions = [caption for _, caption in known]
    checks = [vae, *check_base(cfg, backbone, latents, captions, folder)]
    checks += check_training(cfg, request, module_of(cfg, backbone), latents, captions)
    folder.mkdir(parents=True, exist_ok=True)
    write_checks(checks, folder / CHECKS)
    console.print(check_table(checks))
    console.print(f"{folder / CHECKS}; a picture in {folder / 'check'}")
    if failed := [check.name for check in checks if not check.passed]:
        raise InputError(
            f"check=true: {len(failed)} of {len(checks)} failed: {', '.join(failed)}; the table says what to do"
        )
    return checks


def check_base(
    cfg: DictConfig, backbone: Backbone, latents: Tensor, captions: Sequence[str], folder: Path
) -> list[Check]:
    """What the base's denoiser and sampler come to, on latents (B, C, h, w) of known pictures."""
    settings = SamplerSettings(**cfg.sampling)
    found = [
        denoising_at(backbone, latents, captions, place, settings.batch)
        for place in tqdm(PLACES, "denoising errors", leave=False)
    ]
    return [
        check_denoising(found),
        check_sample(backbone, captions[0], settings, folder / "check" / "sample.png"),
    ]


def check_training(
    cfg: DictConfig, request: Request, module: PreferenceModule, latents: Tensor, captions: Sequence[str]
) -> list[Check]:
    """What a few steps on one device come to, beside the plan of the same step."""
    backbone = module.backbone
    plan, pairs = make_plan(request), request.training.division.micro_batch
    batch = step_batch(backbone, latents, captions, pairs)
    backbone.to("cpu")  # as in training: what the step needs of it comes to the device by itself
    try:
        watch = take_steps(module, batch, cfg.trainer.accelerator, cfg.trainer.precision)
    except InputError as error:  # compiled blocks that round differently
        return [Check("reference = policy", False, "see what to do", str(error))]
    rate = request.flops * request.utilization
    return check_steps(watch, plan["device"]["training"]["total"], pairs * plan["flops"]["pair"], pairs, rate)

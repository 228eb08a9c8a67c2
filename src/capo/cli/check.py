"""Run `check=true`: load the model, measure it on this machine, write `check.json`, print a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from capo.backbones import Backbone
from capo.cli.build import base_of, built, sampler_settings
from capo.cli.plan import request_of
from capo.cli.process import prepare_process
from capo.cli.rates import keep_rates, measure_base, measure_rewards
from capo.cli.readiness import check_accelerator, check_draw, check_weights
from capo.data import PreferenceBatch
from capo.errors import InputError
from capo.module import PreferenceModule
from capo.preflight.model_check import (
    PLACES,
    Check,
    check_denoising,
    check_known,
    check_sample,
    check_table,
    check_vae,
    denoising_at,
    write_checks,
)
from capo.preflight.plan import make_plan
from capo.preflight.rates import check_folder
from capo.preflight.requests import Request
from capo.preflight.step_check import (
    check_checkpointing,
    check_steps,
    free_memory,
    out_of_memory,
    step_batch,
    take_steps,
)
from capo.runtime.outlook import TRAINING
from capo.runtime.processes import own_device
from capo.runtime.run_folder import CHECK, SAMPLES


def run_checks(
    cfg: DictConfig, module_of: Callable[[DictConfig, Backbone], PreferenceModule], console: Console
) -> list[Check]:
    """Run all checks of the configured model on one device; no run is started.

    Args:
        cfg: the configuration, with values that the schema allows.
        module_of: function that builds the module to train from the configuration and a backbone.
        console: where the table is printed.

    Returns:
        The checks; they are also written to `check.json` in the run directory.

    Raises:
        InputError: weights cannot be used, or a check failed; the latter after everything is
            written.
    """
    check_weights(cfg)
    check_draw(cfg)
    check_accelerator(cfg.trainer.accelerator)
    check_folder(Path(cfg.pool.root))
    prepare_process(cfg.threads)
    torch.manual_seed(cfg.seed)
    folder = Path(cfg.run_dir)
    # before weights load, since it refuses a batch that cannot be divided
    request = request_of(cfg, dict.fromkeys(("train", "validation", "test")))
    known = built(cfg, "model.known_images")
    check_known(f"model.known_images: {cfg.model.known_images._target_}", known)
    backbone = base_of(cfg)
    vae, latents = check_vae(backbone, known)
    captions = [caption for _, caption in known]
    checks = [vae, *check_base(cfg, backbone, latents, captions, folder)]
    device, (rates, images) = backbone.device, measure_base(cfg, backbone, captions)
    found, speed = check_training(cfg, request, lambda: module_of(cfg, backbone), latents, captions)
    checks += found
    if speed is not None:
        rates[TRAINING] = speed
    write_checks(checks, folder / CHECK)
    console.print(check_table(checks))
    # last, without the model on the device; a reward of gigabytes takes a while to load
    keep_rates(cfg, request, rates, measure_rewards(cfg, images, captions[0], device), console)
    console.print(f"{folder / CHECK}; sample image in {folder / SAMPLES}")
    if failed := [check.name for check in checks if not check.passed]:
        raise InputError(
            f"check=true: {len(failed)} of {len(checks)} failed: {', '.join(failed)}; the table "
            "says what to do"
        )
    return checks


def check_base(
    cfg: DictConfig, backbone: Backbone, latents: Tensor, captions: Sequence[str], folder: Path
) -> list[Check]:
    """Check the base's denoiser on latents (B, C, h, w) of known images with captions, and its sampler."""
    settings = sampler_settings(cfg)
    found = [
        denoising_at(backbone, latents, captions, place, settings.batch, settings.precision)
        for place in tqdm(PLACES, "denoising errors", leave=False)
    ]
    return [
        check_denoising(found),
        check_sample(backbone, captions[0], settings, folder / SAMPLES / "sample.png"),
    ]


def check_training(
    cfg: DictConfig,
    request: Request,
    build: Callable[[], PreferenceModule],
    latents: Tensor,
    captions: Sequence[str],
) -> tuple[list[Check], float | None]:
    """Check a few optimizer steps on one device against the plan of the same step.

    `build` makes the module to train; it is called twice, for steps with and without gradient checkpointing.

    Returns:
        The checks, and the measured pairs per second as configured, None if no step was taken.
    """
    now, found = bool(cfg.trainer.gradient_checkpointing), {}
    plan, pairs = make_plan(request), request.training.division.micro_batch
    batch: PreferenceBatch | None = None
    for kind in (now, not now):
        module = build()
        module.execution = replace(module.execution, gradient_checkpointing=kind)
        if batch is None:
            rows = pairs * cfg.noise.times_per_pair
            batch = step_batch(module.backbone, latents, captions, rows, cfg.selection.group)
            module.backbone.to("cpu")  # as in training; the step moves the parts that it needs to the device
        try:
            found[kind] = take_steps(module, batch, cfg.trainer.accelerator, cfg.trainer.precision)
        except InputError as error:  # compiled blocks whose rounding differs too much
            if kind == now:
                return [Check("reference = policy", False, "see what to do", str(error))], None
        del module  # before the next one takes its place
        free_memory()
    advice = check_checkpointing(found, now, device_bytes(cfg)) if any(found.values()) else []
    watch = found[now]
    if watch is None:
        return [out_of_memory(found, pairs), *advice], None
    rate = request.flops * request.utilization if request.flops else None
    total, flops = plan["device"]["training"]["total"], pairs * plan["flops"]["pair"]
    return [*check_steps(watch, total, flops, pairs, rate), *advice], pairs / watch.seconds


def device_bytes(cfg: DictConfig) -> int | None:
    """Memory of the device in bytes; None for a CPU."""
    place = own_device(cfg.trainer.accelerator)
    return torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else None

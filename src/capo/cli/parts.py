"""Build the parts of a training run from its configuration: the module and its validation."""

from __future__ import annotations

import math
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from capo.backbones import Backbone
from capo.backbones.averaging import WeightAverage
from capo.backbones.sampling import encode_unconditional
from capo.cli.build import Components, built, inversion_of, is_negative, moving_reference
from capo.cli.run_config import run_id
from capo.cli.values import plain
from capo.data.images import GeneratedImages
from capo.evaluation.held_out import HeldOut
from capo.evaluation.reports.gallery import image_grid
from capo.module import Execution, PreferenceModule, Weighting
from capo.objectives import Anchor
from capo.runtime.launch import launch
from capo.training.choice import Choice
from capo.training.unconditional import unconditional_branch
from capo.training.validation import WinRateValidation, validation_set


def validation_of(
    cfg: DictConfig, components: Components, module: PreferenceModule, folder: Path, console: Console
) -> WinRateValidation:
    """Generate and score the base's validation images, draw them, and build the validation callback."""
    settings = cfg.validation
    judges = [*components.rewards, *components.held_out]
    drawn = GeneratedImages.fill(
        components.pool_specs["validation"], components.generator, judges, progress=True
    )
    base = validation_set(drawn, judges, settings.pictures)
    if launch().first:
        image_grid(
            base.pictures,
            base.pictures,
            [p.text for p in base.prompts[: settings.pictures]],
            folder / "step000000.png",
        )
    console.print(f"validation images of the base: {folder / 'step000000.png'}")
    sampler = components.generator.settings
    share = math.ceil(len(base.prompts) / launch().world_size) * settings.images
    encode_unconditional(module.backbone, sampler, [share])  # now: beside a policy in training is less room
    return WinRateValidation(
        base,
        module.backbone,
        components.rewards,
        sampler,
        settings.every,
        folder,
        HeldOut(components.held_out, cfg.evaluation.seed),
        Choice(settings.monitor, cfg.evaluation.seed),
        WeightAverage(cfg.trainer.ema),
        unconditional_branch(module, sampler, is_negative(cfg)),
    )


def module_of(cfg: DictConfig, backbone: Backbone) -> PreferenceModule:
    """Build the module to train, with policy, reference and objective; it knows of which run it is."""
    lora = plain(cfg.model.lora) if cfg.model.lora else None
    trainer = cfg.trainer
    module = PreferenceModule(
        backbone,
        built(cfg, "objective"),
        lr=trainer.lr,
        warm_up=trainer.warm_up,
        lora=lora,
        weighting=Weighting(cfg.noise.weighting, cfg.noise.bias),
        draw=cfg.noise.draw,
        reduction=cfg.noise.reduction,
        anchor=Anchor(cfg.anchor.weight, cfg.anchor.slack),
        gradient_clip=trainer.gradient_clip,
        max_bad_steps=trainer.max_bad_steps,
        pinned=trainer.pinned,
        execution=Execution(
            trainer.precision,
            trainer.optimizer,
            trainer.gradient_checkpointing,
            trainer.compile,
            trainer.compile_tolerance,
            trainer.channels_last,
            half_frozen=cfg.sampling.precision == trainer.precision,  # else validation could not sample
        ),
        inversion=inversion_of(cfg),
        moving=moving_reference(cfg),
    )
    module.run = run_id(Path(cfg.run_dir))
    return module

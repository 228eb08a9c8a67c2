"""What a run optimizes, in words: for the summary before its first step and for the model card."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from capo.backbones.averaging import MovingReference
from capo.backbones.model_card import NEGATIVE
from capo.cli.build import is_negative, moving_reference, target_name
from capo.cli.online import is_generator, rounds_of
from capo.module import PreferenceModule
from capo.noise import DRAWN, PRIOR
from capo.objectives.averaging import INSIDE, OUTSIDE
from capo.runtime.launch import Division, divide, launch
from capo.runtime.optimizers import ADAMW, ADAMW_8BIT

REDUCED = {OUTSIDE: "mean of their losses", INSIDE: "loss of their mean margin"}
NEGATIVE_USE = (
    "winner and loser are exchanged; validated and evaluated as the unconditional prediction of the base"
)
OPTIMIZERS = {ADAMW: "AdamW", ADAMW_8BIT: "AdamW with moments in 8 bits"}


def division_of(cfg: DictConfig) -> Division:
    """Division of a step's pairs over processes and micro-batches; InputError unless they divide evenly."""
    return divide(cfg.trainer.batch, launch().world_size, cfg.trainer.micro_batch)


def noise_of(noise: DictConfig) -> str:
    """Where the noise of a training sample comes from, in words."""
    if noise.source == PRIOR:
        return "that from which each candidate was sampled"
    whose = "shared by winner and loser" if noise.shared else "independent for winner and loser"
    if noise.source == DRAWN:
        return whose
    own = noise.inversion
    fresh = f", fresh noise of eta {own.eta:g} {whose}" if own.eta else ""
    return f"inverted by the policy in {own.steps} steps with {own.renoise} corrections each{fresh}"


def reference_of(cfg: DictConfig, moving: MovingReference) -> str:
    """How the reference follows the policy, in words."""
    if is_generator(cfg):
        return "generator: the model that drew the candidates of the round"
    often = "each step" if moving.interval == 1 else f"every {moving.interval} steps"
    return f"moving average of the policy, decay {moving.decay:g}, updated {often}"


def facts_of(cfg: DictConfig, module: PreferenceModule) -> dict[str, Any]:
    """Facts about the optimization for the summary and the model card."""
    weighting = f"sigmoid, b = {cfg.noise.bias}" if cfg.noise.weighting == "sigmoid" else cfg.noise.weighting
    trainer, noise, anchor = cfg.trainer, cfg.noise, cfg.anchor
    several = noise.times_per_pair > 1
    times = f", {noise.times_per_pair} per pair, {REDUCED[noise.reduction]}" if several else ""
    held = f"{anchor.weight:g} relu(beta w (m+ - r+) - {anchor.slack:g})"
    return {
        "objective": target_name(cfg.objective),
        "effective beta": "none"
        if module.beta is None
        else f"{module.beta:g}, on mean errors, no further factor",
        **({"anchor": held} if anchor.weight else {}),
        **({"reference": reference_of(cfg, moving)} if (moving := moving_reference(cfg)) else {}),
        "pairs": target_name(cfg.pairs),
        **({"candidates of a prompt": cfg.selection.group} if cfg.selection.group > 2 else {}),
        **({NEGATIVE: NEGATIVE_USE} if is_negative(cfg) else {}),
        **({"rounds": rounds_of(cfg)} if cfg.online.every else {}),
        "calibration": cfg.calibration,
        "weighting": weighting,
        "times": f"{noise.draw}, {noise.times}{times}",
        "noise": noise_of(cfg.noise),
        "learning rate": f"{trainer.lr:g}, {OPTIMIZERS[trainer.optimizer]}, "
        f"linear warm-up over {trainer.warm_up} steps"
        + (f", of which {trainer.max_steps} are done" if trainer.max_steps < trainer.warm_up else ""),
        "gradient clipping": "none"
        if trainer.gradient_clip is None
        else f"norm at most {trainer.gradient_clip:g}",
        "steps": f"{trainer.max_steps} of {trainer.batch} pairs ({division_of(cfg)})",
        **({"pinned": f"{trainer.pinned:g} of the pairs, without prompt"} if trainer.pinned else {}),
        "averaged weights": "none"
        if trainer.ema is None
        else f"decay {trainer.ema:g}; validated and exported",
        "policy": f"LoRA {dict(cfg.model.lora)}" if cfg.model.lora else "all weights",
    }

"""Check that a configuration can run, before anything is loaded, downloaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from capo.backbones.loading import MissingWeights, find_pipeline, find_vae, pipeline_index
from capo.cli.build import all_rewards, built, held_out_rewards, label_sources, pool_specs, prompt_splits
from capo.cli.values import check_values
from capo.data.selection import select
from capo.errors import InputError
from capo.noise import FLOW_DRAWS
from capo.objectives import requirements
from capo.preflight.architecture import published, published_names
from capo.preflight.memory import model_states, parameters
from capo.rewards import Reward
from capo.rewards.weights import look_for
from capo.runtime.hub import check_access


def check_ready(cfg: DictConfig, finished: bool = False, scoring: bool = True, watching: bool = True) -> None:
    """Check that `cfg` can run, before anything is loaded, downloaded or written.

    Values, the model's weights, rewards, prompts, objective, pairs strategy, noise, hub access and
    accelerator are checked in this order.

    Args:
        cfg: the configuration.
        finished: whether the run has finished already; then only values are checked.
        scoring: whether images will be scored; otherwise the weights of rewards are not looked for.
        watching: whether validation images will be scored; otherwise held-out rewards are left out.

    Raises:
        InputError: the first check that fails.
    """
    check_values(cfg)
    if finished:
        return
    check_weights(cfg)
    rewards, evaluated, _ = all_rewards(cfg)
    held_out = held_out_rewards(cfg, rewards, evaluated) if watching else []
    if scoring:
        check_reward_weights([*rewards, *evaluated, *held_out])
    pool_specs(cfg, prompt_splits(cfg))
    requirements(built(cfg.objective))
    nothing = torch.zeros(0, cfg.pool.candidates, len(label_sources(cfg, rewards)))
    select(built(cfg.pairs), nothing, nothing)  # raises InputError if the strategy does not fit the rewards
    check_draw(cfg)
    if cfg.push_to_hub:
        check_access(cfg.push_to_hub)
    check_accelerator(cfg)


def refuse_plans(cfg: DictConfig) -> None:
    """Raise InputError for plan=true and check=true, which only train.py supports."""
    if found := [key for key in ("plan", "check") if cfg.get(key)]:
        raise InputError(
            f"{found[0]}=true belongs to train.py: give it there with the same values; pools and evaluations "
            "are included"
        )


def check_accelerator(cfg: DictConfig) -> None:
    """Raise InputError if the configured accelerator is not on this machine."""
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise InputError(
            f"trainer.accelerator={cfg.trainer.accelerator}: torch finds no such device here; auto uses what "
            "there is"
        )


def check_weights(cfg: DictConfig) -> None:
    """Raise InputError if the model's weights are missing and not downloadable, or of another family."""
    model = cfg.model
    weights = model.backbone.get("weights")
    if weights is None:
        return
    family, options = get_class(model.backbone._target_), OmegaConf.to_container(model.backbone, resolve=True)
    unused = family.unused_parts(**options) if hasattr(family, "unused_parts") else {}
    try:
        folder = find_pipeline(weights, model.backbone.get("revision"), model.backbone.get("variant"), unused)
    except MissingWeights as error:
        raise InputError(f"model={model.name}: {error}{memory_note(cfg)}") from error
    if vae := model.backbone.get("vae"):
        find_vae(vae, model.backbone.get("vae_revision"))
    classes = getattr(family, "pipeline_classes", None)
    if folder and classes:
        pipeline_index(folder, classes)


def check_reward_weights(rewards: Sequence[Reward]) -> None:
    """Raise InputError that names each source of reward weights that is missing and not downloadable."""
    missing = []
    # a reward name used in training and evaluation may have two sources under the same setting
    for setting, (source, revision) in dict.fromkeys(
        item for reward in rewards for item in reward.sources.items()
    ):
        try:
            look_for(source, revision, setting)
        except InputError as error:
            missing.append(str(error))
    if missing:
        raise InputError("\n".join(missing))


def check_draw(cfg: DictConfig) -> None:
    """Raise InputError if the model's noise schedule does not support the configured `noise.draw`."""
    known = getattr(get_class(cfg.model.backbone._target_), "draws", FLOW_DRAWS)
    if cfg.noise.draw not in known:
        raise InputError(
            f"noise.draw={cfg.noise.draw}: model={cfg.model.name} draws times by {' or '.join(known)} only"
        )


def memory_note(cfg: DictConfig) -> str:
    """Memory that tuning all weights of a published model takes, as text; empty for other models."""
    name = cfg.model.get("published") or cfg.model.name
    if name not in published_names():
        return ""
    held = model_states(published(name), None, cfg.trainer.precision, cfg.trainer.optimizer, reference=True)
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in asdict(held).items())
    return (
        f"\n  tuning all of its {parameters(published(name), None)[0]:,} parameters takes "
        f"{held.total / 1e9:.1f} GB before activations ({parts}); add plan=true to the command to see all "
        "that the run takes, also with a low-rank adapter (experiment=lora)"
    )

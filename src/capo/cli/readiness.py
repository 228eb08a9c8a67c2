"""What keeps a configuration from running, found before anything is loaded, downloaded or written."""

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
    """Find out what keeps `cfg` from running before anything is loaded, downloaded or written.

    In this order: values, the model's weights, rewards, prompts, pairs and objective; of a run that has `finished` the values
    alone. `scoring` and `watching` as `build_components` has them: the weights of rewards that nothing asks are not looked for.
    Raises InputError.
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
    select(built(cfg.pairs), nothing, nothing)  # does the strategy fit the rewards?
    check_draw(cfg)
    if cfg.push_to_hub:
        check_access(cfg.push_to_hub)
    check_accelerator(cfg)


def refuse_plans(cfg: DictConfig) -> None:
    """InputError for what train.py alone knows, where another script would pass it over in silence."""
    if found := [key for key in ("plan", "check") if cfg.get(key)]:
        raise InputError(
            f"{found[0]}=true belongs to train.py: the same values there plan, or check, the pools and evaluations too"
        )


def check_accelerator(cfg: DictConfig) -> None:
    """InputError where the configured accelerator is not on this machine."""
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise InputError(
            f"trainer.accelerator={cfg.trainer.accelerator}: torch sees no such device here; auto takes what there is"
        )


def check_weights(cfg: DictConfig) -> None:
    """InputError where the model's weights are neither here nor to be had, or are another family's."""
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
    """InputError that names each file, folder or hub id of these rewards that is neither here nor to be had."""
    missing = []
    # one name, trained and evaluated, may have two sources under the same setting
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
    """InputError where times cannot be drawn in the configured way on the model's schedule."""
    known = getattr(get_class(cfg.model.backbone._target_), "draws", FLOW_DRAWS)
    if cfg.noise.draw not in known:
        raise InputError(
            f"noise.draw={cfg.noise.draw}: model={cfg.model.name} draws its times {' or '.join(known)}, not so"
        )


def memory_note(cfg: DictConfig) -> str:
    """What tuning all weights of a published model holds from the first step to the last; empty for other models."""
    name = cfg.model.get("published") or cfg.model.name
    if name not in published_names():
        return ""
    held = model_states(published(name), None, cfg.trainer.precision, cfg.trainer.optimizer, reference=True)
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in asdict(held).items())
    return (
        f"\n  tuning all of its {parameters(published(name), None)[0]:,} parameters holds {held.total / 1e9:.1f} GB before activations ({parts}); "
        "plan=true beside the command says all that the run takes, of a low-rank adapter too (experiment=lora)"
    )

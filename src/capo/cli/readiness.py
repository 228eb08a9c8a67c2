"""Check that a configuration can run, before anything is loaded, downloaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec

import torch
from omegaconf import DictConfig

from capo.backbones.export import holds_policy
from capo.backbones.finding import MissingWeights, find_pipeline, find_vae, pipeline_index
from capo.backbones.inversion import NO_INVERSION
from capo.backbones.lora import LORA_FILE
from capo.backbones.sampling import BASE, POLICY
from capo.backbones.unconditional import check_negative
from capo.cli.build import (
    built,
    family_of,
    is_negative,
    label_sources,
    moving_reference,
    pool_specs,
    prompt_splits,
    sampler_settings,
    target_name,
)
from capo.cli.engines import check_engine
from capo.cli.named_rewards import all_rewards, held_out_rewards
from capo.cli.online import check_online
from capo.cli.schema.calls import under
from capo.data.candidates import NO_PRIOR
from capo.data.dataset import check_group, check_shared_prior
from capo.data.reference_errors import check_reuse
from capo.data.selection import select
from capo.errors import InputError, ParameterError, closest
from capo.noise import PRIOR
from capo.objectives import Anchor, Requirements, requirements, try_objective
from capo.objectives.averaging import check_reduction
from capo.objectives.base import beta_of, check_shared_noise
from capo.objectives.pinned import check_pinned
from capo.pairs import declaration
from capo.preflight.architecture import published, published_names
from capo.preflight.memory import model_states, parameters
from capo.rewards import Reward
from capo.rewards.weights import look_for
from capo.runtime.launch import FSDP
from capo.runtime.processes import check_accelerator

# function that makes a logger -> packages of which it needs one, the first with the name of the extra
PACKAGES = {"tensorboard_logger": ("tensorboard", "tensorboardX")}


def check_ready(cfg: DictConfig, scoring: bool = True, watching: bool = True) -> None:
    """Check that `cfg` can run, before anything is loaded, downloaded or written.

    The model's weights, rewards, prompts, objective, pairs strategy, noise, hub access and
    accelerator are checked in this order.

    Args:
        cfg: the configuration, with values that the schema allows.
        scoring: whether images will be scored; otherwise the weights of rewards are not looked for.
        watching: whether validation images will be scored; otherwise held-out rewards are left out.

    Raises:
        InputError: the first check that fails.
    """
    check_weights(cfg)
    check_unconditional(cfg)
    rewards, evaluated, _ = all_rewards(cfg)
    held_out = held_out_rewards(cfg, rewards, evaluated) if watching else []
    if scoring:
        check_reward_weights([*rewards, *evaluated, *held_out])
    splits = prompt_splits(cfg)
    pool_specs(cfg, splits)
    check_objective(cfg)
    check_online(cfg, len(splits["train"]))
    check_pairs(cfg, len(label_sources(cfg, rewards)))
    check_draw(cfg)
    check_export(cfg)
    check_accelerator(cfg.trainer.accelerator)
    check_engine(cfg)


def check_objective(cfg: DictConfig) -> None:
    """InputError for an objective that cannot be called, or that does not fit what is added to it."""
    objective = built(cfg, "objective")
    with under("objective"):
        try_objective(objective)
    needs = requirements(objective)
    check_groups(cfg, needs)
    with under("anchor"):
        Anchor(cfg.anchor.weight, cfg.anchor.slack).check(needs, beta_of(objective))
    with under("noise"):
        check_reduction(cfg.noise.reduction, needs)
        check_shared_noise(cfg.noise.shared, needs)
    with under("trainer"):
        check_pinned(cfg.trainer.pinned, needs, cfg.noise.reduction)
        if cfg.trainer.get("reuse_reference"):  # a stored configuration may lack the key
            check_reuse(
                needs,
                source=cfg.noise.source,
                pinned=cfg.trainer.pinned,
                sharded=cfg.trainer.strategy == FSDP,
                frozen=moving_reference(cfg) is None,
            )
    with under("reference"):
        if (moving := moving_reference(cfg)) is not None:
            moving.check(needs, cfg.trainer.pinned)


def check_groups(cfg: DictConfig, needs: Requirements) -> None:
    """InputError for groups that the objective does not read, or that a prompt has too few candidates for."""
    group, name = cfg.selection.group, target_name(cfg.objective)
    if group > 2 and not needs.group:
        raise InputError(
            f"selection.group={group}: objective={name} reads pairs; leave it at 2, or choose "
            "objective=capo_group or objective=kto, which read each candidate"
        )
    if not cfg.pool.imported:  # the number of an imported pool's candidates is its own
        with under("selection"):
            check_group(group, cfg.pool.candidates)


def check_pairs(cfg: DictConfig, sources: int) -> None:
    """InputError where the strategy does not fit so many rewards, or an argument of it cannot be used."""
    strategy = built(cfg, "pairs")
    takes = declaration(strategy).rewards
    if takes not in (None, sources):
        number = "one reward" if takes == 1 else f"{takes} rewards"
        raise InputError(
            f"pairs={target_name(cfg.pairs)} orders the candidates by {number}, but {sources} are selected; "
            f"keep {number} ('rewards=[NAME]') or take pairs=sum, pairs=frs or pairs=random"
        )
    nothing = torch.zeros(0, cfg.pool.candidates, sources)
    with under("pairs"):
        select(strategy, nothing, nothing)


def check_loggers(cfg: DictConfig) -> None:
    """Raise InputError for a logger whose package is not installed."""
    for name, node in (cfg.get("logger") or {}).items():
        packages = PACKAGES.get(target_name(node), ())
        if packages and not any(find_spec(package) for package in packages):
            raise InputError(
                f"logger.{name} needs {packages[0]}, which is not installed: pip install "
                f"'capo[{packages[0]}]', or choose logger=csv or logger=wandb"
            )


def check_weights(cfg: DictConfig) -> None:
    """Raise InputError if the model's weights are missing and not downloadable, or of another family."""
    family, options = family_of(cfg)
    weights, revision, variant = (options.get(key) for key in ("weights", "revision", "variant"))
    if weights is None:
        return
    try:
        folder = find_pipeline(weights, revision, variant, family.unused_parts(**options))
    except MissingWeights as error:
        raise InputError(f"model={cfg.model.name}: {error}{memory_note(cfg)}") from error
    if vae := options.get("vae"):
        find_vae(vae, options.get("vae_revision"))
    if folder:
        family.check_index(pipeline_index(folder, family.pipeline_classes), **options)


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


def check_unconditional(cfg: DictConfig) -> None:
    """InputError where `sampling.unconditional` is no word and no policy's folder, or does not fit a swap."""
    if is_negative(cfg):
        check_negative(sampler_settings(cfg))
    source, component = cfg.sampling.get("unconditional", POLICY), family_of(cfg)[0].denoiser_component
    if source in (POLICY, BASE) or holds_policy(source, component):
        return
    near = closest(str(source), (POLICY, BASE))
    raise InputError(
        f"sampling.unconditional={source}: must be policy, base, or the folder of an exported policy of "
        f"model={cfg.model.name}, which holds '{component}/config.json' or '{LORA_FILE}'"
        + (f"; did you mean {near[0]}?" if near else "; give the `policy/` folder of a finished run")
    )


def check_sharded_guidance(cfg: DictConfig, processes: int) -> None:
    """InputError where training shards its networks, but the unconditional prediction's would be whole."""
    negative = is_negative(cfg)
    source = BASE if negative else cfg.sampling.get("unconditional", POLICY)
    if cfg.trainer.strategy != FSDP or processes == 1 or source == POLICY:
        return
    whole = "that policy"
    if source == BASE:
        if cfg.model.lora or requirements(built(cfg, "objective")).reference:
            return
        whole = f"the base, which objective={target_name(cfg.objective)} does not read in training"
    if negative:
        raise InputError(
            f"selection.swap=true: trainer.strategy={FSDP} does not shard {whole}, beside which a negative "
            "model is validated; choose an objective that reads the reference, or trainer=ddp"
        )
    raise InputError(
        f"sampling.unconditional={source}: trainer.strategy={FSDP} does not shard {whole}; train with "
        "sampling.unconditional=policy, and evaluate with it afterwards: "
        f"evaluate.py run=DIR sampling.unconditional={source}"
    )


def check_draw(cfg: DictConfig) -> None:
    """InputError if `noise.draw` or `noise.source` is none that the model's noise schedule supports."""
    known, source = family_of(cfg)[0].draws, cfg.noise.source
    if cfg.noise.draw not in known:
        raise InputError(
            f"noise.draw={cfg.noise.draw}: model={cfg.model.name} draws times by {' or '.join(known)} only"
        )
    with under("noise"):
        check_shared_prior(cfg.noise.shared, source == PRIOR)
        if source == PRIOR and cfg.pool.imported:
            raise ParameterError("source", source, NO_PRIOR)
        if source not in family_of(cfg)[0].noise_sources:
            raise ParameterError("source", source, f"model={cfg.model.name}: {NO_INVERSION}")


def check_export(cfg: DictConfig) -> None:
    """Raise InputError for a format of the policy that its model or its adapter cannot have."""
    dtype = cfg.get("export_dtype", "float32")
    if cfg.get("export") == "single_file" and not family_of(cfg)[0].single_file:
        raise InputError(
            f"export=single_file: model={cfg.model.name} is no UNet, and only those of SD1.5 and SDXL have a "
            "layout for one file here; give export=adapter or export=full"
        )
    if cfg.model.get("lora") and cfg.get("export") in ("adapter", "single_file") and dtype != "float32":
        raise InputError(
            f"export_dtype={dtype}: an adapter is always written in float32; leave export_dtype out, or give "
            "export=full to merge the adapter into a whole pipeline"
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

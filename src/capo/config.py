"""The border between Hydra's configuration and the package: beyond it there are objects and named values only."""

from __future__ import annotations

import importlib.resources
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from capo.backbones import Backbone
from capo.errors import InputError
from capo.evaluation import evaluate
from capo.export import load_policy, policy_fingerprint
from capo.generation import STAGES, ImageGenerator, PoolPlan
from capo.held_out import refuse_trained
from capo.importing.chosen import Imported
from capo.importing.filling import HUMAN
from capo.pool.import_table import HUMAN_LABELS
from capo.processes import launch
from capo.prompts import Prompt, check_splits, missing_inputs
from capo.rewards import Reward, load_rewards
from capo.runs import CONFIG, OUTCOME, read_config
from capo.sampling import SamplerSettings
from capo.training_data import TrainingData


def _shipped(name: str) -> str:
    """Absolute path of what ships with the package under `shapes/weights/<name>`."""
    return str(importlib.resources.files("capo.shapes") / "weights" / name)


def _evaluation_folder(run: str | None) -> str:
    """Where an evaluation keeps Hydra's own output: in the run that it evaluates, else in a folder of its own."""
    return f"{run}/evaluation" if run and (Path(run) / CONFIG).is_file() else datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-evaluate")


OmegaConf.register_new_resolver("shipped", _shipped, replace=True)
OmegaConf.register_new_resolver("evaluation_folder", _evaluation_folder, replace=True, use_cache=True)


@dataclass(frozen=True)
class World:
    """What every stage needs: the base and its sampler, prompts by split, rewards trained and rewards evaluated."""

    generator: ImageGenerator
    splits: dict[str, Sequence[Prompt]]
    rewards: list[Reward]
    evaluation_rewards: list[Reward]
    oracle: list[Reward]  # measured in evaluations beside the rewards; empty where the model's world has none
    plans: dict[str, PoolPlan]  # train, validation, test, zero
    held_out: list[Reward] = field(default_factory=list)  # score validation images beside the trained ones

    @property
    def backbone(self) -> Backbone:
        """The base's pipeline."""
        return self.generator.backbone


def prepare_process(threads: int | None) -> int:
    """Set the torch threads of this process and silence what other libraries say of themselves; returns the threads.

    Default: cores divided by the processes that a launcher started on this machine; where there is none, OMP_NUM_THREADS
    counts, by which joblib tells the jobs of a sweep their share.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a run that goes on
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} must be at least 1; leave it out for all cores")
    torch.set_num_threads(threads or _default_threads())
    return torch.get_num_threads()


def _default_threads() -> int:
    here, told = launch(), os.environ.get("OMP_NUM_THREADS", "")
    processes = here.local_world if here.world > 1 else int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if not processes and told.isdigit() and int(told) > 0:
        return int(told)
    return max(1, (os.cpu_count() or 1) // (processes or 1))


def built(node: DictConfig, **given: object) -> object:
    """What `_target_` makes; a user's value that it refuses stays an InputError."""
    try:
        return instantiate(node, **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def prompt_splits(cfg: DictConfig) -> dict[str, Sequence[Prompt]]:
    """The prompt sets by split. Raises InputError for sets that are not given or cannot be used."""
    if missing := sorted(OmegaConf.missing_keys(cfg.prompts)):
        raise InputError(missing_inputs(missing, OmegaConf.to_container(cfg.prompts, resolve=True)))
    splits = built(cfg.prompts)
    check_splits(splits)
    return splits


def build_world(cfg: DictConfig, scoring: bool = True, watching: bool = True) -> World:
    """Everything that generation, training and evaluation share. Cheap checks come before weights are loaded.

    `scoring`: whether images will be scored, for which the rewards are built. `watching`: whether validation images will be;
    without it the world has no held-out rewards, which score nothing else.
    """
    splits = prompt_splits(cfg)
    settings = SamplerSettings(**cfg.sampling)
    rewards, evaluated, oracle = all_rewards(cfg)
    held_out = held_out_rewards(cfg, rewards, evaluated) if watching else []
    plans = pool_plans(cfg, splits)
    for reward in {reward.key: reward for reward in [*rewards, *evaluated, *oracle, *held_out] if scoring}.values():
        reward.setup("cpu")  # so that weights that are missing are found before images are drawn
    return World(ImageGenerator.base(base_of(cfg), settings), splits, rewards, evaluated, oracle, plans, held_out)


def base_of(cfg: DictConfig) -> Backbone:
    """The base, loaded, on the device that it works on."""
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    return built(cfg.model.backbone, name=cfg.model.name).to(device)


def labels_of(cfg: DictConfig, rewards: list[Reward]) -> list[Reward]:
    """What orders the candidates that training draws from: the rewards, or in an imported pool whoever has chosen."""
    return [HUMAN] if cfg.pool.get("imported") and cfg.pool.labels == HUMAN_LABELS else rewards


def imported_pool(cfg: DictConfig, splits: dict[str, Sequence[Prompt]]) -> Imported:
    """`pool.imported`, less what is held out for validation and test."""
    return Imported.open(cfg.pool.imported, cfg.pool.labels, [*splits["validation"], *splits["test"]])


def check_imported(cfg: DictConfig) -> None:
    """InputError where `pool.imported` is given and cannot be trained on; nothing is loaded."""
    if cfg.pool.get("imported"):
        imported_pool(cfg, prompt_splits(cfg))


def training_data(cfg: DictConfig, world: World, stages: Sequence[str] = STAGES) -> TrainingData:
    """What pairs are drawn from; `stages` of the base's own pool are completed, of an imported one the scores."""
    rewards = labels_of(cfg, world.rewards)
    if cfg.pool.get("imported"):
        return TrainingData.imported(imported_pool(cfg, world.splits), world.generator, rewards)
    return TrainingData.sampled(world.plans["train"], world.generator, rewards, stages)


def all_rewards(cfg: DictConfig) -> tuple[list[Reward], list[Reward], list[Reward]]:
    """The rewards that are trained, those that are evaluated, and the oracle's measures; no scorer is built."""
    oracle = rewards_of(cfg, "evaluation.oracle") if cfg.evaluation.oracle else []
    trained = rewards_of(cfg, "rewards")
    # one that is trained and evaluated is one object, whose weights are in memory once
    evaluated = _known(rewards_of(cfg, "evaluation.rewards"), trained)
    return trained, evaluated, oracle


def held_out_rewards(cfg: DictConfig, trained: Sequence[Reward], evaluated: Sequence[Reward]) -> list[Reward]:
    """The rewards that watch training from outside; InputError for one that is trained."""
    if not cfg.validation.get("held_out"):  # runs of before have no such key
        return []
    held_out = rewards_of(cfg, "validation.held_out")
    refuse_trained(held_out, trained)
    return _known(held_out, evaluated)


def _known(rewards: Sequence[Reward], others: Sequence[Reward]) -> list[Reward]:
    return [next((own for own in others if own == reward), reward) for reward in rewards]


def rewards_of(cfg: DictConfig, place: str) -> list[Reward]:
    """The rewards at a key, in the order of their names, which no command line changes."""
    entries = OmegaConf.to_container(OmegaConf.select(cfg, place), resolve=True)
    return sorted(load_rewards(entries, place), key=lambda reward: reward.name)


def pool_plans(cfg: DictConfig, splits: dict[str, Sequence[Prompt]]) -> dict[str, PoolPlan]:
    """The four pools of the base's images: candidates, validation, test, and test with other seeds (the zero line)."""

    def plan(split: str, seed: int, candidates: int, prompts: Sequence[Prompt]) -> PoolPlan:
        return PoolPlan(Path(cfg.pool.root), cfg.model.name, split, seed, prompts, candidates, cfg.pool.prompts_per_shard)

    evaluation, test = cfg.evaluation, splits["test"]
    return {
        "train": plan("train", cfg.pool.seed, cfg.pool.candidates, splits["train"]),
        "validation": plan("validation", evaluation.seed, cfg.validation.images, splits["validation"]),
        "test": plan("test", evaluation.seed, evaluation.images, test),
        "zero": plan("test", evaluation.seed + 1, evaluation.images, test[: evaluation.zero_prompts]),
    }


def evaluate_policy(cfg: DictConfig, world: World, policy: Path, folder: Path, curves: Path | None = None) -> dict:
    """Compare an exported policy with the base; results and report go to `folder`. See `capo.evaluation.evaluate`."""
    backbone, settings = world.backbone, world.generator.settings
    tuned = ImageGenerator(backbone, load_policy(backbone, policy, settings.precision), policy_fingerprint(backbone, policy), settings)
    return evaluate(
        folder, world.plans["test"], tuned, world.evaluation_rewards, zero=world.plans["zero"], oracle=world.oracle,
        title=f"{cfg.model.name}: tuned against base", config=OmegaConf.to_yaml(cfg, resolve=True), curves=curves,
    )  # fmt: skip


def foreign_targets(cfg: DictConfig, trusted: Sequence[str] = ()) -> list[str]:
    """What a run's config may not call: each `_target_` outside this package and the modules in `trusted`, and each program
    (a reward's `python`) that is not in `trusted` itself.
    """
    found: list[str] = []

    def walk(node) -> None:
        if isinstance(node, dict):
            target = node.get("_target_")
            if target and not any(target == module or target.startswith(f"{module}.") for module in ("capo", *trusted)):
                found.append(target)
            if "scorer" in node and node.get("python") and node["python"] not in trusted:
                found.append(node["python"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(OmegaConf.to_container(cfg, resolve=False))
    return found


def run_config(folder: Path, cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a finished run, with what the command line names in its place.

    Raises InputError for a folder that is no run, a run that has not finished, and a run whose config would call code
    outside this package that `trust` does not name.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"run={folder} is no run: it has no config.yaml; give the directory that train.py printed")
    own = read_config(folder)
    if not (folder / OUTCOME).is_file():
        raise InputError(f"run={folder} has not finished: it has no outcome.json; train it to its end first")
    if foreign := foreign_targets(own, cfg.trust):
        raise InputError(
            f"run={folder}: its config.yaml calls {', '.join(foreign)}; if you trust that code, say trust=[{foreign[0] if '/' in foreign[0] else foreign[0].split('.')[0]}]"
        )
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~").split("@")[-1]
        if key not in ("run", "runs", "policy", "base", "trust") and not key.startswith("hydra"):
            OmegaConf.update(own, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return own

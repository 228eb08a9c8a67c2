"""The border between Hydra's configuration and the package: beyond it there are objects and named values only."""

from __future__ import annotations

import importlib.resources
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from capo.backbones import Backbone
from capo.errors import InputError
from capo.evaluation import evaluate
from capo.export import load_policy, policy_fingerprint
from capo.generation import ImageGenerator, PoolPlan
from capo.prompts import Prompt, check_splits
from capo.rewards import Reward, load_rewards
from capo.sampling import SamplerSettings


def _shipped(name: str) -> str:
    """Absolute path of what ships with the package under `shapes/weights/<name>`."""
    return str(importlib.resources.files("capo.shapes") / "weights" / name)


def _evaluation_folder(run: str | None) -> str:
    """Where an evaluation keeps Hydra's own output: in the run that it evaluates, else in a folder of its own."""
    return f"{run}/evaluation" if run else datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-evaluate")


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

    @property
    def backbone(self) -> Backbone:
        """The base's pipeline."""
        return self.generator.backbone


def prepare_process(threads: int | None) -> int:
    """Set the torch threads of this process and silence what other libraries say of themselves; returns the threads.

    Default: cores divided by the processes that were started on this machine.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a run that goes on
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} must be at least 1; leave it out for all cores")
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local))
    return torch.get_num_threads()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the process with the message alone where a user's value cannot be used; HYDRA_FULL_ERROR=1 brings the trace."""
    try:
        yield
    except InputError as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def build_world(cfg: DictConfig) -> World:
    """Everything that generation, training and evaluation share. Cheap checks come before weights are loaded."""
    splits = dict(instantiate(cfg.prompts))
    check_splits(splits)
    settings = SamplerSettings(**cfg.sampling)
    rewards = rewards_of(cfg.rewards)
    evaluated = rewards_of(cfg.evaluation.rewards)
    oracle = rewards_of(cfg.evaluation.oracle) if cfg.evaluation.oracle else []
    plans = pool_plans(cfg, splits)
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    backbone = instantiate(cfg.model.backbone, name=cfg.model.name).to(device)
    return World(ImageGenerator.base(backbone, settings), splits, rewards, evaluated, oracle, plans)


def rewards_of(cfg: DictConfig) -> list[Reward]:
    """The rewards of a `rewards` group, in the order of their names, which no command line changes."""
    return sorted(load_rewards(OmegaConf.to_container(cfg, resolve=True)), key=lambda reward: reward.name)


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
    tuned = ImageGenerator(backbone, load_policy(backbone, policy), policy_fingerprint(backbone, policy), settings)
    return evaluate(
        folder, world.plans["test"], tuned, world.evaluation_rewards, zero=world.plans["zero"], oracle=world.oracle,
        title=f"{cfg.model.name}: tuned against base", config=OmegaConf.to_yaml(cfg, resolve=True), curves=curves,
    )  # fmt: skip


def foreign_targets(cfg: DictConfig, trusted: Sequence[str] = ()) -> list[str]:
    """Every `_target_` outside this package and the modules named in `trusted`, which a run's config may not call."""
    found: list[str] = []

    def walk(node) -> None:
        if isinstance(node, dict):
            target = node.get("_target_")
            if target and not any(target == module or target.startswith(f"{module}.") for module in ("capo", *trusted)):
                found.append(target)
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
    if not (folder / "config.yaml").is_file():
        raise InputError(f"run={folder} is no run: it has no config.yaml; give the directory that train.py printed")
    if not (folder / "outcome.json").is_file():
        raise InputError(f"run={folder} has not finished: it has no outcome.json; train it to its end first")
    own = OmegaConf.load(folder / "config.yaml")
    if foreign := foreign_targets(own, cfg.trust):
        raise InputError(
            f"run={folder}: its config.yaml calls {', '.join(foreign)}; if you trust that code, say trust=[{foreign[0].split('.')[0]}]"
        )
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~").split("@")[-1]
        if key not in ("run", "runs", "policy", "base", "trust") and not key.startswith("hydra"):
            OmegaConf.update(own, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    return own

"""Tune a base model: candidate pool -> calibrated pairs -> policy, the best by validation win-rate, and its evaluation.

    python train.py objective=capo pairs=frs
    python train.py -m objective.beta=10,30,100
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from capo import training
from capo.config import World, build_world, check_ready, evaluate_policy, prepare_process
from capo.data import PreferenceData
from capo.drawn import Drawn
from capo.entry import plain_errors, start
from capo.export import ModelCard, export_policy, policy_fingerprint, write_card
from capo.generation import fill_pool
from capo.loggers import RunIdentity, WandbRun
from capo.module import PreferenceModule, Weighting
from capo.report import image_grid
from capo.runs import OUTCOME, Progress, open_run, read_outcome, write_outcome
from capo.sweep import found_figures, run_job, sweep_name
from capo.validation import MONITOR, WinRateValidation, validation_set

console = Console()


def target_name(node: DictConfig) -> str:
    """The name of the function that a group's choice calls."""
    return node._target_.rsplit(".", 1)[-1]


def validation_of(cfg: DictConfig, world: World, folder: Path) -> WinRateValidation:
    """Make the base's validation images and a first picture of them."""
    settings = cfg.validation
    drawn = Drawn.fill(world.plans["validation"], world.generator, world.rewards, progress=True)
    base = validation_set(drawn, world.rewards, settings.pictures)
    image_grid(base.pictures, base.pictures, [p.text for p in base.prompts[: settings.pictures]], folder / "step000000.png")
    console.print(f"validation pictures of the base: {folder / 'step000000.png'}")
    return WinRateValidation(base, world.backbone, world.rewards, world.generator.settings, settings.every, folder)


def module_of(cfg: DictConfig, world: World) -> PreferenceModule:
    """Policy, reference and objective."""
    lora = OmegaConf.to_container(cfg.model.lora, resolve=True) if cfg.model.lora else None
    trainer = cfg.trainer
    return PreferenceModule(
        world.backbone, instantiate(cfg.objective), lr=trainer.lr, warm_up=trainer.warm_up, lora=lora,
        weighting=Weighting(cfg.noise.weighting, cfg.noise.bias), gradient_clip=trainer.gradient_clip,
        max_bad_steps=trainer.max_bad_steps,
    )  # fmt: skip


def facts_of(cfg: DictConfig, module: PreferenceModule) -> dict[str, object]:
    """What the summary and the model card say of the optimisation."""
    weighting = f"sigmoid, b = {cfg.noise.bias}" if cfg.noise.weighting == "sigmoid" else cfg.noise.weighting
    trainer = cfg.trainer
    return {
        "objective": target_name(cfg.objective),
        "effective beta": "none" if module.beta is None else f"{module.beta:g}, on mean errors, no further factor",
        "pairs": target_name(cfg.pairs),
        "calibration": cfg.calibration,
        "weighting": weighting,
        "noise": "shared by winner and loser" if cfg.noise.shared else "independent for winner and loser",
        "learning rate": f"{trainer.lr:g}, AdamW, linear warm-up over {trainer.warm_up} steps",
        "steps": f"{trainer.max_steps} of {trainer.batch * trainer.accumulate} pairs",
        "policy": f"LoRA {dict(cfg.model.lora)}" if cfg.model.lora else "all weights",
    }


def identity_of(cfg: DictConfig, group: str | None) -> RunIdentity:
    """How trackers find the run: flat axes, tags, and the sweep that it is a job of."""
    objective, pairs, rewards = target_name(cfg.objective), target_name(cfg.pairs), sorted(cfg.rewards)
    axes = {
        "objective": objective, "beta": cfg.objective.beta, "bias": cfg.noise.bias, "pairs": pairs, "rewards": "+".join(rewards),
        "model": cfg.model.name, "lr": cfg.trainer.lr, "seed": cfg.seed,
    }  # fmt: skip
    return RunIdentity(axes, OmegaConf.to_container(cfg, resolve=True), group, [objective, pairs, cfg.model.name, *rewards])


@contextmanager
def trackers(cfg: DictConfig, group: str | None, folder: Path) -> Iterator[list[Logger]]:
    """The loggers; those that track runs get the run's identity before it, its figures after it, and are closed."""
    loggers = list(instantiate(cfg.logger).values())
    tracking = [logger for logger in loggers if isinstance(logger, WandbRun)]
    try:
        for logger in tracking:
            logger.begin(identity_of(cfg, group))
        yield loggers
        for logger in tracking:
            logger.summarise(found_figures(folder))
    finally:
        for logger in tracking:
            logger.close()


def tune(
    cfg: DictConfig, world: World, folder: Path, loggers: Sequence[Logger]
) -> tuple[PreferenceModule, float, dict[str, object]]:
    """Fill the pools, select pairs, fit, keep the best. Returns module, its validation win-rate and the facts."""
    module = module_of(cfg, world)  # before any image is drawn: a bad objective or beta ends here
    strategy = instantiate(cfg.pairs)
    validation = validation_of(cfg, world, folder / "validation")
    plan = world.plans["train"]
    pool = fill_pool(plan, world.generator, world.rewards, verify=False)
    candidates = training.select_candidates(
        pool, plan.prompts, plan.candidates, world.rewards, strategy, cfg.calibration, cfg.seed, cfg.noise.shared
    )
    facts = facts_of(cfg, module)
    training.print_summary(facts, candidates, module, console)
    if warning := training.beta_warning(facts["objective"], module.beta, dict(cfg.model.beta_range), cfg.model.name):
        console.print(f"[yellow]{warning}")
    trainer = cfg.trainer
    best = training.fit(
        module, PreferenceData(candidates.dataset, trainer.batch, cfg.data.workers), validation,
        loggers, folder, max_steps=trainer.max_steps, log_every=trainer.log_every,
        accelerator=trainer.accelerator, devices=trainer.devices, precision=trainer.precision, accumulate=trainer.accumulate,
    )  # fmt: skip
    return module, training.load_best(module, best), facts


def train(cfg: DictConfig, world: World, folder: Path, loggers: Sequence[Logger]) -> None:
    """Tune, export, and write down that training has finished."""
    module, win_rate, facts = tune(cfg, world, folder, loggers)
    data = f"{len(world.plans['train'].prompts)} prompts x {cfg.pool.candidates} candidates of the base, scored by " + ", ".join(
        reward.name for reward in world.rewards
    )
    card = ModelCard(str(facts["objective"]), data, settings=facts)
    policy = export_policy(world.backbone, module.policy, folder / "policy", card, full=cfg.export == "full")
    write_outcome(folder, {MONITOR: win_rate, "policy": policy_fingerprint(world.backbone, policy), "card": dataclasses.asdict(card)})


def evaluate_run(cfg: DictConfig, world: World, folder: Path) -> None:
    """Compare the run's policy with the base, and put the win-rates on its card."""
    policy = folder / "policy"
    found = evaluate_policy(cfg, world, policy, folder / "evaluation", curves=folder / "metrics.csv")
    write_card(world.backbone, policy, dataclasses.replace(ModelCard(**read_outcome(folder)["card"]), win_rates=found["win_rate"]))


def run(cfg: DictConfig, group: str | None = None) -> float:
    """One training run, whole, or what is missing of it; returns the best validation win-rate.

    `group` names the sweep that it is a job of.
    """
    folder = Path(cfg.run_dir)
    check_ready(cfg, finished=(folder / OUTCOME).is_file())
    prepare_process(cfg.threads)
    torch.manual_seed(cfg.seed)
    progress = open_run(folder, cfg)
    evaluated = (folder / "evaluation" / "results.json").is_file()
    if progress is Progress.FINISHED:
        console.print(f"{folder} holds this run already, finished")
    if progress is not Progress.FINISHED or (cfg.evaluate and not evaluated):
        world = build_world(cfg)
        with trackers(cfg, group, folder) as loggers:
            if progress is not Progress.FINISHED:
                train(cfg, world, folder, loggers)
            if cfg.evaluate:
                evaluate_run(cfg, world, folder)
    win_rate = read_outcome(folder)[MONITOR]
    console.print(f"best validation win-rate {win_rate:.3f}; everything of this run is in {folder}")
    return win_rate


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    own = HydraConfig.get()
    with plain_errors():
        if own.mode is RunMode.MULTIRUN:
            return run_job(partial(run, cfg, sweep_name(Path(own.sweep.dir))), Path(cfg.run_dir))
        return run(cfg)


if __name__ == "__main__":
    start(main)

"""Do a training run from a configuration: tune, export and evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from capo.backbones import Backbone
from capo.backbones.export import export_policy, policy_fingerprint
from capo.backbones.model_card import ModelCard, write_card
from capo.cli.build import Components, build_components, target_name, training_data
from capo.cli.evaluate import evaluate_policy
from capo.cli.facts import division_of, facts_of
from capo.cli.process import prepare_process
from capo.cli.report import report_run
from capo.cli.run_config import Progress, open_run
from capo.cli.sweep import found_figures
from capo.cli.values import plain
from capo.data.dataset import ENCODE, Times
from capo.data.images import GeneratedImages
from capo.evaluation.held_out import HeldOut, alarms
from capo.evaluation.reports.calibration_page import print_warnings
from capo.evaluation.reports.page import image_grid
from capo.module import Execution, PreferenceModule, Weighting
from capo.objectives import Anchor
from capo.runtime.hub import push
from capo.runtime.launch import launch
from capo.runtime.processes import leave_group, own_device, process_group, run_on_first_process
from capo.runtime.run_folder import (
    CALIBRATION,
    EVALUATION,
    METRICS,
    MONITOR,
    POLICY,
    RESULTS,
    VALIDATION,
    read_outcome,
    write_outcome,
)
from capo.training.averaging import WeightAverage
from capo.training.checkpoints import load_best
from capo.training.choice import Choice
from capo.training.fit import encode_aside, fit
from capo.training.loader import PreferenceData
from capo.training.loggers import RunIdentity, WandbRun
from capo.training.signal import GradientSignal
from capo.training.strength import choose_strength
from capo.training.summary import beta_warning, print_summary
from capo.training.unconditional import unconditional_branch
from capo.training.validation import Place, WinRateValidation, validation_set

console = Console()


def validation_of(
    cfg: DictConfig, components: Components, module: PreferenceModule, folder: Path
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
        unconditional_branch(module, sampler),
    )


def module_of(cfg: DictConfig, backbone: Backbone) -> PreferenceModule:
    """Build the module to train, with policy, reference and objective."""
    lora = plain(cfg.model.lora) if cfg.model.lora else None
    trainer = cfg.trainer
    return PreferenceModule(
        backbone,
        instantiate(cfg.objective),
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
    )


def identity_of(cfg: DictConfig, group: str | None) -> RunIdentity:
    """Identity of the run for experiment trackers: swept settings, tags, and its sweep `group`."""
    objective, pairs, rewards = target_name(cfg.objective), target_name(cfg.pairs), sorted(cfg.rewards)
    axes = {
        "objective": objective,
        "beta": cfg.objective.get("beta"),
        "bias": cfg.noise.bias,
        "pairs": pairs,
        "rewards": "+".join(rewards),
        "model": cfg.model.name,
        "lr": cfg.trainer.lr,
        "seed": cfg.seed,
    }
    return RunIdentity(axes, plain(cfg), group, [objective, pairs, cfg.model.name, *rewards])


@contextmanager
def trackers(cfg: DictConfig, group: str | None, folder: Path) -> Iterator[list[Logger]]:
    """Yield the loggers; only the first process has any.

    Experiment trackers among them get the run's identity at the start and its figures at the end, and are
    closed.
    """
    loggers = list(instantiate(cfg.logger).values()) if launch().first else []
    tracking = [logger for logger in loggers if isinstance(logger, WandbRun)]
    try:
        for logger in tracking:
            logger.begin(identity_of(cfg, group))
        yield loggers
        for logger in tracking:
            logger.summarize(found_figures(folder))
    finally:
        for logger in tracking:
            logger.close()


def tune(
    cfg: DictConfig, components: Components, folder: Path, loggers: Sequence[Logger]
) -> tuple[PreferenceModule, float, dict[str, Any]]:
    """Fill the pools, select pairs, train, and load the best checkpoint.

    Returns:
        The module with the best policy, its validation win-rate, and the facts for the model card.
    """
    # before any image is generated, since it refuses a wrong objective or beta
    module = module_of(cfg, components.backbone)
    strategy = instantiate(cfg.pairs)
    validation = validation_of(cfg, components, module, folder / VALIDATION)
    data = training_data(cfg, components)
    candidates = data.select(strategy, cfg.calibration, cfg.seed, cfg.noise.shared)
    facts = facts_of(cfg, module) | {"data": data.described}
    print_summary(facts, candidates, module, console)
    found = run_on_first_process(lambda: report_run(data, candidates, strategy, cfg.calibration, folder))
    print_warnings(found, console)
    console.print(f"calibration report: {folder / CALIBRATION}", markup=False, soft_wrap=True)
    if warning := beta_warning(
        facts["objective"], module.beta, dict(cfg.model.beta_range or {}), cfg.model.name
    ):
        console.print(f"[yellow]{warning}")
    trainer, division = cfg.trainer, division_of(cfg)
    encode = partial(encode_aside, components.backbone) if cfg.data.text == ENCODE else None
    signal = GradientSignal(trainer.signal_every)
    best = fit(
        module,
        PreferenceData(
            candidates.dataset,
            division.micro_batch,
            cfg.data.workers,
            encode,
            Times(cfg.noise.times, cfg.noise.times_per_pair),
        ),
        validation,
        loggers,
        folder,
        max_steps=trainer.max_steps,
        log_every=trainer.log_every,
        strategy=trainer.strategy,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        precision=trainer.precision,
        accumulate=division.accumulate,
        signal=signal,
    )
    if advice := signal.advice(trainer.batch, candidates.selection.statistics().usable):
        _tell([advice])
    trained = load_best(module, best)
    rate, told = best_strength(cfg, module, validation, trained, folder)
    return module, rate, facts | told


def best_strength(
    cfg: DictConfig,
    module: PreferenceModule,
    validation: WinRateValidation,
    trained: Mapping[str, Tensor],
    folder: Path,
) -> tuple[float, dict[str, Any]]:
    """Say which checkpoint was chosen; try lower strengths and give the policy the best one.

    Returns:
        The policy's win-rate on the validation prompts, and facts for the model card.
    """
    choice, facts = validation.choice, {}
    _tell(choice.sentences())
    if strengths := plain(cfg.validation).get("strengths"):
        here = launch()
        place = Place(module.backbone.device, here.rank, here.world_size)
        curve, choice = choose_strength(module, validation, trained, strengths, place)
        run_on_first_process(lambda: curve.write(folder))
        _tell([*curve.lines(), *choice.sentences()])
        facts["strength"] = f"{curve.chosen:g}, chosen among {', '.join(f'{a:g}' for a in curve.points)}"
    if choice.best is None:
        raise ValueError("no checkpoint was validated")
    facts["validation"] = f"{choice.best.rate} against the base, {choice.monitor} of the rewards"
    if warnings := choice.warnings():
        facts["warning"] = " ".join(warnings)
    return choice.best.rate.mean, facts


def _tell(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        console.print(sentence, markup=False, soft_wrap=True, highlight=False)


def train(cfg: DictConfig, components: Components, folder: Path, loggers: Sequence[Logger]) -> None:
    """Tune, export the policy, and mark the run as finished; only the first process writes."""
    module, win_rate, facts = tune(cfg, components, folder, loggers)
    run_on_first_process(lambda: finish(cfg, components, folder, module, win_rate, facts))


def finish(
    cfg: DictConfig,
    components: Components,
    folder: Path,
    module: PreferenceModule,
    win_rate: float,
    facts: dict[str, Any],
) -> None:
    """Export the policy to `folder`/policy, and write outcome.json, which marks the run as finished."""
    source = components.generator.settings.unconditional
    card = ModelCard(str(facts["objective"]), str(facts.pop("data")), None, facts, source)
    policy = export_policy(
        components.backbone, module.policy, folder / POLICY, card, full=cfg.export == "full"
    )
    outcome = {
        MONITOR: win_rate,
        "policy": policy_fingerprint(components.backbone, policy),
        "card": dataclasses.asdict(card),
    }
    write_outcome(folder, outcome | ({"alarms": alarms(folder / METRICS)} if components.held_out else {}))


def evaluate_run(cfg: DictConfig, components: Components, folder: Path) -> None:
    """Evaluate the run's policy against the base, and write the win-rates to its model card."""
    policy = folder / POLICY
    found = evaluate_policy(cfg, components, policy, folder / EVALUATION, run=folder)
    if found is None:
        return
    write_card(
        components.backbone,
        policy,
        dataclasses.replace(ModelCard(**read_outcome(folder)["card"]), win_rates=found["win_rate"]),
    )


def complete_run(cfg: DictConfig, group: str | None, folder: Path) -> None:
    """Complete the run in `folder`: tune and export, evaluate if `evaluate` is set, push if `push_to_hub` is.

    Steps that are already done are left out. `group` names the sweep that the run is a job of.
    """
    prepare_process(cfg.threads)
    torch.manual_seed(cfg.seed)
    console.quiet = not launch().first
    with process_group(cuda=own_device(cfg.trainer.accelerator).type == "cuda"):
        progress, evaluated = run_on_first_process(
            lambda: (open_run(folder, cfg), (folder / EVALUATION / RESULTS).is_file())
        )
        if progress is Progress.FINISHED:
            console.print(f"{folder} already holds this run, finished")
        if progress is not Progress.FINISHED or (cfg.evaluate and not evaluated):
            components = build_components(cfg, watching=progress is not Progress.FINISHED)
            with trackers(cfg, group, folder) as loggers:
                if progress is not Progress.FINISHED:
                    train(cfg, components, folder, loggers)
                leave_group()  # from here on processes need no communication
                if cfg.evaluate:
                    evaluate_run(cfg, components, folder)
    if cfg.push_to_hub and launch().first:
        console.print(f"pushed: {push(folder / POLICY, cfg.push_to_hub)}")
    console.print(
        f"best validation win-rate {read_outcome(folder)[MONITOR]:.3f}; all files of this run are in {folder}"
    )

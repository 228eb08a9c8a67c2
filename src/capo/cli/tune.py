"""Do a training run from a configuration: tune, export and evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from capo.cli.build import Components, build_components, built, target_name, training_data
from capo.cli.evaluate import evaluate_own
from capo.cli.facts import division_of, facts_of
from capo.cli.finish import best_strength, finish, tell
from capo.cli.parts import module_of, validation_of
from capo.cli.process import prepare_process
from capo.cli.report import report_run
from capo.cli.run_config import Progress, open_run
from capo.cli.sweep import found_figures
from capo.cli.values import plain
from capo.data.dataset import ENCODE, Times
from capo.evaluation.reports.calibration_page import print_warnings
from capo.module import PreferenceModule
from capo.runtime.hub import push
from capo.runtime.launch import launch
from capo.runtime.processes import leave_group, own_device, process_group, run_on_first_process
from capo.runtime.run_folder import (
    CALIBRATION,
    EVALUATION,
    MONITOR,
    POLICY,
    RESULTS,
    VALIDATION,
    read_outcome,
)
from capo.runtime.terminal import Terminal
from capo.training.fit import encode_aside, fit
from capo.training.loader import PreferenceData
from capo.training.loggers import RunIdentity, WandbRun
from capo.training.signal import GradientSignal
from capo.training.summary import beta_warning, print_selection, print_summary, unused_devices

console = Terminal()


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
    loggers = [built(cfg, f"logger.{name}") for name in cfg.logger] if launch().first else []
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
    strategy = built(cfg, "pairs")
    facts = facts_of(cfg, module)
    announce(cfg, facts, module)
    validation = validation_of(cfg, components, module, folder / VALIDATION, console)
    data = training_data(cfg, components)
    candidates = data.select(strategy, cfg.calibration, cfg.seed, cfg.noise.shared)
    print_selection(candidates, data.described, console)
    found = run_on_first_process(lambda: report_run(data, candidates, strategy, cfg.calibration, folder))
    print_warnings(found, console)
    console.print(f"calibration report: {folder / CALIBRATION}", soft_wrap=True)
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
        checkpoint_every=trainer.checkpoint_every,
    )
    if advice := signal.advice(trainer.batch, candidates.selection.statistics().usable):
        tell([advice], console)
    tell(validation.choice.sentences(), console)
    rate, told = best_strength(cfg, module, validation, Path(best.best_model_path), folder, console)
    return module, rate, facts | {"data": data.described} | told


def announce(cfg: DictConfig, facts: dict[str, Any], module: PreferenceModule) -> None:
    """Print what will be optimized, before the pools are filled, and what looks like an oversight."""
    print_summary(facts, module, console)
    ranges = dict(cfg.model.beta_range or {})
    if warning := beta_warning(facts["objective"], module.beta, ranges, cfg.model.name):
        console.print(warning, style="yellow")
    if cfg.trainer.accelerator != "cpu" and (
        line := unused_devices(torch.cuda.device_count(), launch().local_world_size)
    ):
        console.print(line, style="yellow")


def train(cfg: DictConfig, components: Components, folder: Path, loggers: Sequence[Logger]) -> None:
    """Tune, export the policy, and mark the run as finished; only the first process writes."""
    module, win_rate, facts = tune(cfg, components, folder, loggers)
    run_on_first_process(lambda: finish(cfg, components, folder, module, win_rate, facts))


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
                    evaluate_own(cfg, components, folder)
    if cfg.push_to_hub and launch().first:
        console.print(f"pushed: {push(folder / POLICY, cfg.push_to_hub)}")
    console.print(
        f"best validation win-rate {read_outcome(folder)[MONITOR]:.3f}; all files of this run are in {folder}"
    )

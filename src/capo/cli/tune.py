"""Do a training run from a configuration: tune, export and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from capo.backbones.export import stored_fingerprint
from capo.cli.build import Components, build_components, built, check_exported
from capo.cli.engines import engaged
from capo.cli.evaluate import check_root, evaluate_own
from capo.cli.facts import division_of, facts_of
from capo.cli.finish import best_strength, finish, tell
from capo.cli.merge import base_of_policies
from capo.cli.outlook import followed, outlook_line
from capo.cli.parts import module_of, validation_of
from capo.cli.pool_state import check_pools
from capo.cli.process import prepare_process
from capo.cli.report import report_run
from capo.cli.reuse import reused_reference
from capo.cli.rounds import round_data, round_facts, trained_on, write_rounds
from capo.cli.run_config import Progress, begin_training, open_run
from capo.cli.tracking import trackers
from capo.data.candidates import Candidates, TrainingData
from capo.data.dataset import ENCODE, Times
from capo.data.rounds import Round, rounds_left
from capo.evaluation.reports.calibration_page import print_warnings
from capo.evaluation.stored import is_evaluated
from capo.module import PreferenceModule
from capo.runtime.hub import push
from capo.runtime.launch import launch
from capo.runtime.outlook import EVALUATION as EVALUATING
from capo.runtime.outlook import Outlook
from capo.runtime.processes import leave_group, own_device, process_group, run_on_first_process
from capo.runtime.run_folder import (
    CALIBRATION,
    EVALUATION,
    ONLINE,
    POLICY,
    VALIDATION,
    alone,
    best_win_rate,
    check_policy,
)
from capo.runtime.terminal import Terminal
from capo.training.fit import encode_aside, fit, trained_steps
from capo.training.loader import PreferenceData
from capo.training.progress import Pace
from capo.training.rounds import RoundRecord
from capo.training.signal import GradientSignal
from capo.training.strength import read_strength
from capo.training.summary import beta_warning, print_rounds, print_selection, print_summary, unused_devices
from capo.training.validation import WinRateValidation

console = Terminal()


@dataclass(frozen=True)
class Training:
    """What the rounds of a training share."""

    cfg: DictConfig
    components: Components
    folder: Path
    loggers: Sequence[Logger]
    validation: WinRateValidation
    signal: GradientSignal
    pace: Pace
    record: RoundRecord | None  # None: there is one round, of which nothing is recorded

    def run(
        self, part: Round, module: PreferenceModule, data: TrainingData, candidates: Candidates
    ) -> ModelCheckpoint:
        """Train to the end of a round; errors as in `fit`."""
        cfg, trainer, division = self.cfg, self.cfg.trainer, division_of(self.cfg)
        encode = partial(encode_aside, self.components.backbone) if cfg.data.text == ENCODE else None
        batches = PreferenceData(
            candidates.dataset,
            division.micro_batch,
            cfg.data.workers,
            encode,
            Times(cfg.noise.times, cfg.noise.times_per_pair),
            digests=trainer.reuse_reference and module.needs.reference,
            begun=part.first * division.accumulate,
        )
        with reused_reference(cfg, module, data.pool.folder, console):
            return fit(
                module,
                batches,
                self.validation,
                self.loggers,
                self.folder,
                max_steps=part.last,
                log_every=trainer.log_every,
                strategy=trainer.strategy,
                accelerator=trainer.accelerator,
                devices=trainer.devices,
                precision=trainer.precision,
                accumulate=division.accumulate,
                signal=self.signal,
                checkpoint_every=trainer.checkpoint_every,
                pace=self.pace,
                record=self.record,
                begin=partial(begin_training, self.folder, cfg),
            )


@dataclass(frozen=True)
class Tuned:
    """What is left of a training: the last round's module, pairs and data, and where the checkpoints are."""

    module: PreferenceModule
    candidates: Candidates
    data: TrainingData
    best: ModelCheckpoint


def in_rounds(training: Training, module: PreferenceModule, facts: dict[str, Any]) -> Tuned:
    """Train what is left of a run, in rounds of `online.every` steps, or in a single one.

    Each round resumes from the checkpoint of the last one, as an interrupted run does from its own.
    """
    cfg, components, folder, record = training.cfg, training.components, training.folder, training.record
    steps = cfg.trainer.max_steps
    step = trained_steps(folder, module) if cfg.online.every else 0
    for part in rounds_left(step, cfg.online.every, steps):
        data = round_data(cfg, components, module, part, step, folder, facts)
        place = folder / ONLINE / part.name if part.number else folder
        candidates = chosen_pairs(cfg, data, part.seed(cfg.seed), place)
        if part.number:  # the module has been trained, or has taken weights to be exported
            module = module_of(cfg, components.backbone)
            training.validation.follow(module)
        if record:
            record.begin(part, round_facts(part, data, candidates, components, folder))
        best = training.run(part, module, data, candidates)
        if record:
            rows = record.rows
            run_on_first_process(lambda rows=rows: write_rounds(folder, rows))
        step = part.last
        if step == steps:
            return Tuned(module, candidates, data, best)
    raise AssertionError("a run has a last round")


def tune(
    cfg: DictConfig, components: Components, folder: Path, loggers: Sequence[Logger], outlook: Outlook
) -> tuple[PreferenceModule, float, dict[str, Any]]:
    """Fill the pools, select pairs, train, and load the best checkpoint.

    `outlook` is what is left of the run.

    Returns:
        The module with the best policy, its validation win-rate, and the facts for the model card.
    """
    # before any image is generated, since it refuses a wrong objective or beta
    module = module_of(cfg, components.backbone)
    facts = facts_of(cfg, module)
    announce(cfg, facts, module, outlook)
    check_pools(cfg, components)
    validation = validation_of(cfg, engaged(cfg, components), module, folder / VALIDATION, console)
    every, trainer = cfg.online.every, cfg.trainer
    strengths = len(cfg.validation.strengths or ())
    pace = Pace(outlook, trainer.batch, cfg.validation.every, strengths, every, trainer.max_steps)
    signal, record = GradientSignal(trainer.signal_every), RoundRecord() if every else None
    training = Training(cfg, components, folder, loggers, validation, signal, pace, record)
    found = in_rounds(training, module, facts)
    if record:
        print_rounds(record.rows, console)
    if advice := signal.advice(trainer.batch, found.candidates.selection.statistics().usable):
        tell([advice], console)
    tell(validation.choice.sentences(), console)
    best = Path(found.best.best_model_path)
    rate, told = best_strength(cfg, found.module, validation, best, folder, console)
    return found.module, rate, facts | {"data": trained_on(cfg, found.data, best)} | told


def chosen_pairs(cfg: DictConfig, data: TrainingData, seed: int, folder: Path) -> Candidates:
    """Calibrate the scores, select pairs, and write the calibration report to `folder`; tell about both."""
    strategy = built(cfg, "pairs")
    candidates = data.select(
        strategy,
        cfg.calibration,
        seed,
        cfg.noise.shared,
        group=cfg.selection.group,
        source=cfg.noise.source,
        swap=cfg.selection.swap,
    )
    print_selection(candidates, data.described, console)
    found = run_on_first_process(lambda: report_run(data, candidates, strategy, cfg.calibration, folder))
    print_warnings(found, console)
    console.print(f"calibration report: {folder / CALIBRATION}", soft_wrap=True)
    return candidates


def announce(cfg: DictConfig, facts: dict[str, Any], module: PreferenceModule, outlook: Outlook) -> None:
    """Print what will be optimized and the hours of it, before any image is drawn, and likely oversights."""
    print_summary(facts, module, console)
    tell([outlook_line(outlook, cfg.trainer.accelerator)], console)
    ranges = dict(cfg.model.beta_range or {})
    if warning := beta_warning(facts["objective"], module.beta, ranges, cfg.model.name):
        console.print(warning, style="yellow")
    if cfg.trainer.accelerator != "cpu" and (
        line := unused_devices(torch.cuda.device_count(), launch().local_world_size)
    ):
        console.print(line, style="yellow")


def train(
    cfg: DictConfig, components: Components, folder: Path, loggers: Sequence[Logger], outlook: Outlook
) -> None:
    """Tune, export the policy, and mark the run as finished; only the first process writes."""
    module, win_rate, facts = tune(cfg, components, folder, loggers, outlook)
    run_on_first_process(lambda: finish(cfg, components, folder, module, win_rate, facts))


def check_unchanged(cfg: DictConfig, folder: Path) -> None:
    """Raise InputError if the policy in `folder` is not the one that its finished run exported."""
    base = base_of_policies(cfg)
    check_exported(folder, stored_fingerprint(folder / POLICY, base.component, lambda: base.fingerprint))


def complete_run(cfg: DictConfig, group: str | None, folder: Path) -> None:
    """Complete the run in `folder`: tune and export, evaluate if `evaluate` is set, push if `push_to_hub` is.

    Steps that are already done are left out. `group` names the sweep that the run is a job of.
    """
    prepare_process(cfg.threads)
    torch.manual_seed(cfg.seed)
    console.quiet = not launch().first
    if cfg.evaluate:
        check_root(cfg, folder / EVALUATION)
        if not cfg.validation.strengths:  # else it is written anew; the report of the evaluation shows it
            read_strength(folder)
    with alone(folder), process_group(cuda=own_device(cfg.trainer.accelerator).type == "cuda"):
        progress, evaluated = run_on_first_process(lambda: (open_run(folder, cfg), is_evaluated(folder)))
        if progress is Progress.FINISHED:
            run_on_first_process(lambda: check_policy(folder))
            console.print(f"{folder} already holds this run, finished")
        if progress is not Progress.FINISHED or (cfg.evaluate and not evaluated):
            with trackers(cfg, group, folder) as loggers:  # first: they may refuse, and loading takes long
                components = build_components(cfg, watching=progress is not Progress.FINISHED)
                with followed(cfg, components, folder, loggers) as outlook:
                    if progress is not Progress.FINISHED:
                        train(cfg, components, folder, loggers, outlook)
                    leave_group()  # from here on processes need no communication
                    outlook.only(EVALUATING)
                    if cfg.evaluate:
                        evaluate_own(cfg, components, folder)
    if cfg.push_to_hub and launch().first:
        if progress is Progress.FINISHED:
            check_unchanged(cfg, folder)
        console.print(f"pushed: {push(folder / POLICY, cfg.push_to_hub)}")
    console.print(
        f"best validation win-rate {best_win_rate(folder):.3f}; all files of this run are in {folder}"
    )

"""From a filled pool to the best policy: selection, the summary of what is optimised, the fit, the choice."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.table import Table
from torch import Tensor

from capo.backbones import Backbone
from capo.calibration import Spread, calibrate, spread
from capo.checkpoints import SameBatches, ValidatedCheckpoint, WholeCheckpoints
from capo.data import PairDataset, PreferenceData
from capo.errors import InputError
from capo.loggers import CurvesFile
from capo.module import PreferenceModule
from capo.pairs import Strategy
from capo.pool import Pool, PoolReader
from capo.processes import Launch, cluster, launch
from capo.prompts import Prompt
from capo.rewards import Reward
from capo.runs import check_checkpoint
from capo.selection import Selection, select
from capo.strategies import AUTO, device_count, make_strategy
from capo.validation import MONITOR, WinRateValidation


@dataclass(frozen=True)
class Candidates:
    """A scored pool, calibrated and selected.

    Attributes:
        dataset: what training draws pairs from.
        spreads: per reward, of its calibrated values.
        rewards: their names, in the same order.
        scores, calibrated: (P, N, L) raw scores and calibrated rewards.
    """

    dataset: PairDataset
    spreads: list[Spread]
    rewards: list[str]
    scores: Tensor
    calibrated: Tensor

    @property
    def selection(self) -> Selection:
        """Winners, losers and gaps."""
        return self.dataset.selection


def select_candidates(pool: Pool, prompts: Sequence[Prompt], candidates: int, rewards: Sequence[Reward], strategy: Strategy,
                      calibration: str, seed: int, shared_noise: bool) -> Candidates:
    """Raw scores of a complete pool -> calibrated rewards -> pairs.

    Raises InputError for a strategy that does not fit the rewards, an unknown calibration, a score that cannot be used,
    and where no prompt has a pair with dR > 0.
    """
    positions = pool.positions(prompts)
    scores = pool.scores([reward.key for reward in rewards], candidates, positions)
    calibrated = calibrate(scores, [r.link for r in rewards], [r.scale for r in rewards], calibration, [r.name for r in rewards])
    selection = select(strategy, scores, calibrated)
    if not selection.usable.any():
        raise InputError(
            f"none of {len(prompts)} prompts has a pair with dR > 0: use more candidates (pool.candidates={candidates}), "
            "fewer rewards, or pairs=sum"
        )
    dataset = PairDataset(PoolReader(pool), positions, prompts, selection, seed, shared_noise)
    return Candidates(dataset, spread(calibrated), [reward.name for reward in rewards], scores, calibrated)


def encode_aside(backbone: Backbone, prompts: list[str]) -> dict[str, Tensor]:
    """What the denoiser needs of B prompts, by the text encoders on the CPU, where they are during training steps."""
    with backbone.visiting("cpu"):
        return backbone.encode_prompts(prompts)


def print_summary(facts: dict[str, object], candidates: Candidates, module: PreferenceModule, console: Console) -> None:
    """What is being optimised, before the first step is taken."""
    found = candidates.selection.statistics()
    table = Table(title="what is being optimised", show_header=False, title_justify="left")
    trained = sum(p.numel() for p in module.policy.parameters() if p.requires_grad)
    rows = facts | {
        "error": "mean over channels, height and width, float32; loss: mean over pairs",
        "trained parameters": f"{trained:,}",
        "prompts": f"{found.usable} kept, {found.prompts - found.usable} skipped (no pair with dR > 0)",
        "X+ / X-": f"{found.winners:.1f} / {found.losers:.1f} candidates a prompt, {found.pairs:.1f} pairs to draw from",
    }
    for name, spread_ in zip(candidates.rewards, candidates.spreads):
        shares = "" if spread_.flat != spread_.flat else f", flat {spread_.flat:.0%}, saturated {spread_.saturated:.0%} of prompts"
        rows[f"spread of {name}"] = f"{spread_.std:.3f}{shares}"
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def beta_warning(objective: str, beta: float | None, ranges: dict[str, Sequence[float]], model: str) -> str | None:
    """One sentence where beta lies outside of what was measured for the model, else None."""
    if beta is None or ranges.get(objective) is None:
        return None
    low, high = ranges[objective]
    if low <= beta <= high:
        return None
    return f"objective.beta={beta:g} lies outside {low:g}-{high:g}, the range that was measured for {objective} on {model}"


class Curves(L.Callback):
    """Hands the figures of a step to the loggers, every `every` steps, before the step's checkpoint is written.

    Lightning's own logging comes after the checkpoint: a run that goes on from there would lack a row.
    """

    def __init__(self, every: int):
        self.every, self._seen, self._pairs, self._began = every, 0, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, index: int) -> None:
        if self._pairs == 0:
            self._began = time.perf_counter()
        self._pairs += len(batch.prompt_ids) * trainer.world_size

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int) -> None:
        """Nothing until the optimiser has moved."""
        step = trainer.global_step
        if step == self._seen:
            return
        seconds, pairs = time.perf_counter() - self._began, self._pairs
        self._seen, self._pairs = step, 0
        logged = step % self.every == 0
        figures = module.take_figures(of_all=logged) | {"time/pairs_per_second": pairs / seconds}
        if logged:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """What was logged is on the disk before the checkpoint that comes after it."""
        for logger in trainer.loggers:
            logger.save()


def _own_devices(devices: int | str | Sequence[int], here: Launch) -> int | str | Sequence[int]:
    """What Lightning shall take on this machine: one device a process; which one, a process that is alone may say."""
    if here.world > 1:
        return here.local_world
    return 1 if device_count(devices) is None else devices


def fit(module: PreferenceModule, data: PreferenceData, validation: WinRateValidation, loggers: list[Logger], folder: Path, *,
        max_steps: int, log_every: int, accelerator: str, precision: str, accumulate: int, devices: int | str | Sequence[int] = 1,
        strategy: str = AUTO) -> ModelCheckpoint:
    """Train for `max_steps` optimiser steps; the checkpoint with the highest validation win-rate is kept beside the last.

    Goes on from `checkpoints/last.ckpt` where there is one: weights, optimiser, order, visits and curves are then those of a
    run that was never cut off, whatever the strategy and the devices of either (but for rounding). The backbone spends the
    steps on the CPU, and is then where it was; validation takes with it what it needs.
    """
    here = launch()
    last = folder / "checkpoints" / "last.ckpt"
    begun = last.is_file()
    if begun:
        check_checkpoint(last, module, module.trained_names(), module.backbone.fingerprints["denoiser"])
    step = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"] if begun else 0
    for logger in loggers:
        if here.first and isinstance(logger, CurvesFile) and logger.rows:
            logger.drop_after(step)
    checkpoints = ValidatedCheckpoint(
        validation, folder / "checkpoints", filename="{step:06d}", monitor=MONITOR, mode="max", save_top_k=1, save_last=True,
        every_n_train_steps=1, auto_insert_metric_name=False, enable_version_counter=False,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator=accelerator, devices=_own_devices(devices, here), num_nodes=here.machines,
        strategy=make_strategy(strategy, here.world), precision=precision, max_steps=max_steps, max_epochs=-1,
        accumulate_grad_batches=accumulate, logger=loggers, default_root_dir=folder,
        callbacks=[Curves(log_every), validation, checkpoints, SameBatches(), TQDMProgressBar(refresh_rate=1, leave=True)],
        plugins=[WholeCheckpoints(), *([cluster()] if here.world > 1 else [])], use_distributed_sampler=False,
        enable_model_summary=False, num_sanity_val_steps=0, inference_mode=False,
    )  # fmt: skip
    home = module.backbone.device
    module.backbone.to("cpu")
    trainer.fit(module, datamodule=data, ckpt_path=last if begun else None, weights_only=True)
    module.trainer = None
    module.policy.zero_grad(set_to_none=True)
    gc.collect()  # the trainer is in cycles, and with it go optimiser and reference
    module.backbone.to(home)
    if checkpoints.best_model_score is None:
        raise InputError(f"no validation took place in {max_steps} steps; set validation.every to at most trainer.max_steps")
    return checkpoints

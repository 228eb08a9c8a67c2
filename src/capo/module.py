"""Training step: errors of policy and frozen reference on the same noisy latents -> the objective's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import lightning as L
import torch
from torch import Tensor, nn

from capo.backbones import Backbone
from capo.backbones.averaging import MovingReference
from capo.backbones.denoising import KnownErrors, Weighting, denoising_error, pair_errors
from capo.backbones.execution import PLAIN, Execution
from capo.backbones.inversion import Inversion
from capo.backbones.models import Denoiser
from capo.backbones.networks import Reference, fresh_policy
from capo.backbones.parallel import place
from capo.backbones.unconditional import UnconditionalText
from capo.data import PreferenceBatch
from capo.errors import InputError
from capo.metrics import Figures, drift_by_time, largest_margin, training_figures
from capo.objectives import Anchor, Objective, PairErrors, anchor_penalty, mean_over_times, requirements
from capo.objectives.averaging import INSIDE, OUTSIDE, check_reduction
from capo.objectives.base import beta_of, joined, losses_of
from capo.objectives.pinned import check_pinned, pinned_loss, pinned_rows, select_rows
from capo.runtime.launch import launch
from capo.runtime.optimizers import SkippedSteps, clip_gradients, make_optimizer

__all__ = ["Execution", "PreferenceModule", "Weighting", "denoising_error"]
NO_ANCHOR = Anchor()


class PreferenceModule(L.LightningModule):
    """Lightning module that trains a copy of the backbone's denoiser, the policy, against the frozen base.

    Args:
        backbone: model family, noise schedule and base; it is not registered as a submodule, so that
            checkpoints contain only the policy.
        objective: a function of `capo.objectives` with its beta bound.
        lr: learning rate of AdamW (weight decay 0) after the warm-up.
        warm_up: steps of linear warm-up.
        weighting: weight of a pair by its time.
        draw: how times are drawn (`Backbone.timesteps`).
        reduction: `outside`: the mean of a pair's losses at its times; `inside`: the loss of its mean margin.
        anchor: penalty on the winner's error above the reference's.
        lora: {rank, alpha, seed} for a LoRA policy, whose reference is the policy with the adapter turned
            off; None: train all weights.
        gradient_clip: largest gradient norm; larger gradients are scaled down to it. None: no limit.
        max_bad_steps: training stops after this many consecutive steps with a gradient that is not finite.
        pinned: share of the pairs whose loss pins the unconditional prediction to the reference's instead
            (`capo.objectives.pinned`).
        execution: settings of memory and speed.
        inversion: how the policy inverts the latents of a batch (`capo.backbones.inversion`); None: the noise
            of the batch is added to them.
        moving: reference that follows the policy; None: the base stays the reference.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        *,
        lr: float,
        warm_up: int,
        weighting: Weighting,
        draw: str = "uniform",
        reduction: str = OUTSIDE,
        anchor: Anchor = NO_ANCHOR,
        lora: dict | None = None,
        gradient_clip: float | None = None,
        max_bad_steps: int = 10,
        pinned: float = 0.0,
        execution: Execution = PLAIN,
        inversion: Inversion | None = None,
        moving: MovingReference | None = None,
    ):
        super().__init__()
        self.strict_loading = False  # the reference is not in a checkpoint
        self.__dict__["_backbone"], self.lora, self.execution = backbone, lora, execution
        self.policy: Denoiser = fresh_policy(backbone, lora, execution)
        self.objective, self.needs = objective, requirements(objective)
        separate = self.needs.reference and not lora
        self._reference = Reference(backbone, execution.precision, separate=separate, moving=moving)
        self.known: KnownErrors | None = None  # errors of the reference that need no pass
        self.beta = beta_of(objective)
        anchor.check(self.needs, self.beta)
        check_reduction(reduction, self.needs)
        check_pinned(pinned, self.needs, reduction)
        if moving is not None:
            moving.check(self.needs, pinned)
        self.pinned, self.unconditional = pinned, UnconditionalText(backbone)
        self.reduction, self.anchor = reduction, anchor
        self.lr, self.warm_up, self.weighting, self.draw = lr, warm_up, weighting, draw
        self.inversion = inversion
        self.gradient_clip, self.skipped = gradient_clip, SkippedSteps(max_bad_steps)
        # takes loss and share of the first half, set for a step whose batch goes backward in two halves
        self.hold_gradient: Callable[[Tensor, float], None] | None = None
        self.figures = Figures()
        self.run: str | None = None  # identity of the run, by which its checkpoints are known
        self._untrained = True  # until the first batch, whose margin should be 0

    @property
    def backbone(self) -> Backbone:
        """The frozen base with its model family: schedule, VAE, text encoders."""
        return self.__dict__["_backbone"]

    def trained_names(self) -> set[str]:
        """Keys of `state_dict` that a checkpoint holds: the policy's, without what LoRA leaves frozen."""
        frozen = {
            f"policy.{name}"
            for name, parameter in self.policy.named_parameters()
            if not parameter.requires_grad
        }
        return set(self.state_dict()) - (frozen if self.lora else set())

    def configure_model(self) -> None:
        """Prepare policy and reference for `execution` and Lightning's strategy, on this process's device.

        With `known` errors the reference stays where it is until one is lacking.
        """
        self.policy.train()  # no effect without dropout; Lightning warns about modules in eval mode
        if self.execution.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        where = self.execution, self.trainer.strategy.root_device, self.device_mesh
        place(self.policy, *where)
        self._reference.place(*where, wait=self.known is not None)

    def reference(self) -> AbstractContextManager[nn.Module]:
        """Context manager that yields the reference, gradients disabled (`capo.backbones.networks`)."""
        return self._reference.beside(self)

    @property
    def reference_is_base(self) -> bool:
        """Whether the objective reads a reference, and it is the frozen base."""
        return self.needs.reference and self._reference.moving is None

    def configure_callbacks(self) -> list[L.Callback]:
        """The moving reference, which Lightning calls before checkpoints are saved."""
        return [] if (moving := self._reference.moving) is None else [moving]

    def pair_errors(self, batch: PreferenceBatch) -> PairErrors:
        """Denoising errors of policy and reference on B pairs (`capo.backbones.denoising.pair_errors`)."""
        needs = self.needs
        if self.pinned:
            rows = pinned_rows(batch.u, self.pinned)
            batch = replace(batch, text=self.unconditional.at(rows, batch.text))
            needs = replace(needs, predictions=True)
        return pair_errors(
            self.backbone,
            self.policy,
            self.reference,
            batch,
            needs,
            self.weighting,
            self.draw,
            self.inversion,
            self.known,
        )

    def training_step(self, batch: PreferenceBatch, index: int) -> Tensor:
        """Mean loss over the pairs of a batch, a scalar; also logs the figures of the step.

        With `hold_gradient` it is the second half's part of that mean.
        """
        if self.hold_gradient is None:
            errors = self.pair_errors(batch)
            loss = told = self._loss(errors, batch)
        else:
            errors, loss, told = self._in_halves(batch, self.hold_gradient)
        if self._untrained and self._trainer is not None:
            self._check_first(errors)
        self.figures.note({"train/loss": told.detach()})
        kept, u = errors, batch.u
        if self.pinned:
            rows = ~pinned_rows(u, self.pinned)
            kept, u = select_rows(errors, rows), u[rows]
        if len(u):  # every pair of a small batch can be pinned
            self.figures.note(training_figures(kept, self.beta))
            if self.needs.reference and self.needs.loser:
                self.figures.note(drift_by_time(kept, u))
        return loss

    def _in_halves(
        self, batch: PreferenceBatch, hold: Callable[[Tensor, float], None]
    ) -> tuple[PairErrors, Tensor, Tensor]:
        """Errors, the second half's part of the mean loss, and that mean; `hold` gets the first half's."""
        halves = batch.halves()
        share = len(halves[0].u) / len(batch.u)
        first = self.pair_errors(halves[0])
        held = share * self._loss(first, halves[0])
        hold(held, share)
        second = self.pair_errors(halves[1])
        loss = (1 - share) * self._loss(second, halves[1])
        return joined(first, second), loss, held.detach() + loss.detach()

    def _loss(self, errors: PairErrors, batch: PreferenceBatch) -> Tensor:
        """Mean loss of the pairs of a batch, pinned ones and the anchor's penalty included; a scalar."""
        if self.reduction == INSIDE and batch.times > 1:
            errors = mean_over_times(errors, batch.times)
        losses = losses_of(self.objective, errors)
        pinned = pinned_rows(batch.u, self.pinned) if self.pinned else None
        if pinned is not None:
            losses = torch.where(pinned, pinned_loss(errors, self.beta), losses)
        loss = losses.mean()
        if not self.anchor.weight or self.beta is None:
            return loss
        penalties = anchor_penalty(errors, beta=self.beta, slack=self.anchor.slack)
        penalty = (penalties if pinned is None else penalties * ~pinned).mean()
        added, pairs = self.anchor.weight * penalty, len(errors.policy_winner)
        self.figures.note({"train/anchor": (pairs * added.detach(), pairs)})
        return loss + added

    def _check_first(self, errors: PairErrors) -> None:
        """Print the largest |h| of the first batch, which is 0 if policy and reference round alike.

        Raises InputError if, with compiled blocks, it exceeds the tolerated share of the mean dR / beta.
        """
        self._untrained = False
        if errors.reference_loser is None or self.beta is None:
            return
        largest, aim = largest_margin(errors, self.beta)
        told = (
            f"largest |h| of the first batch: {largest:.3g}, {largest / aim:.2%} of the mean dR / beta "
            f"({aim:.2g})"
        )
        self.print(told)
        self.execution.check_rounding(largest, aim, told)

    def take_figures(self, of_all: bool = False) -> dict[str, float]:
        """Mean of each figure over the batches since the last call (`of_all`: over all processes)."""
        return self.figures.take(of_all) | {"train/skipped_steps": float(self.skipped.total)}

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip the gradient norm; if it is not finite, drop the gradients, so that no weight changes.

        Raises InputError after `max_bad_steps` such steps in a row.
        """
        norm = clip_gradients(list(self.policy.parameters()), self.gradient_clip or math.inf)
        if not self.skipped.note(norm, self.global_step):
            self.figures.note({"train/gradient_norm": norm})
            if self.gradient_clip is not None:
                self.figures.note({"train/clipped": (norm > self.gradient_clip).float()})
            return
        optimizer.zero_grad(set_to_none=True)
        if self.skipped.too_many:
            raise InputError(
                f"{self.skipped.in_a_row} steps in a row had a gradient that is not finite; the last "
                f"checkpoint is kept. Lower trainer.lr (now {self.lr}) or objective.beta (now {self.beta})"
            )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leave out frozen weights; add what a resumed run continues from, and whose it is: base and run.

        What it continues from is counts of skipped steps, and figures since the last row of the curves.
        """
        trained = self.trained_names()
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in trained
        }
        checkpoint["bad_steps"] = self.skipped.total, self.skipped.in_a_row
        checkpoint["figures"] = self.figures.totals(of_all=True)
        checkpoint["base"] = self.backbone.fingerprints["denoiser"]
        if self.run is not None:
            checkpoint["run"] = self.run

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore counts and figures; the policy is trained, so the first batch is not checked."""
        self.skipped.total, self.skipped.in_a_row = checkpoint["bad_steps"]
        # those of all processes, so that one of them continues with all
        self.figures.restore(checkpoint.get("figures", {}) if launch().first else {})
        self._untrained = False

    def configure_optimizers(self):
        """AdamW without weight decay, with linear warm-up, over the trained weights (LoRA: the adapter)."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = make_optimizer(
            self.execution.optimizer, trained, self.lr, scaled=self.execution.precision == "16-mixed"
        )
        warm = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warm_up))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}

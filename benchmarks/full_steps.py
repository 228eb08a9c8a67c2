"""Timing of one setting of the training step in Lightning, in turn with other ways to take the same step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.machine import forget_peak, now, peak_bytes
from benchmarks.timing import median_ratio
from capo.backbones import Backbone
from capo.backbones.parallel import repeated_blocks
from capo.data import PreferenceBatch
from capo.module import Execution, PreferenceModule, Weighting, denoising_error
from capo.objectives import PairErrors, capo
from capo.training.curves import Curves

OURS, BARE, FOUR, PUBLISHED = "capo", "bare loop", "four passes", "published"
PRECISION = "bf16-mixed"
PAPER_BATCH = 256  # pairs per optimizer step
ACCUMULATED = 2  # forward and backward passes in a round; the optimizer's step follows the last one
VAE_BATCH = 8  # images encoded at a time, as in published trainers
LORA = {"rank": 32, "alpha": 32, "seed": 0}
MODELS = {  # bias of the weight, beta and draw of times, as in conf/model
    "sdxl": {"bias": 1.5, "beta": 500, "draw": "uniform"},
    "sd3": {"bias": -1.0, "beta": 50, "draw": "logsnr_uniform"},
}
Take = Callable[[PreferenceBatch], Tensor]  # a batch -> its loss, under autocast


@dataclass(frozen=True)
class Setting:
    """Setting of a training step; with `compare`, the step is timed in turn with the other ways."""

    micro_batch: int
    lora: bool = False
    checkpointing: bool = True
    compile: bool = False
    channels_last: bool = False
    compare: bool = False

    @property
    def key(self) -> str:
        """Name of the setting in the results table."""
        parts = [
            "LoRA" if self.lora else "full",
            "checkpointing" if self.checkpointing else "no checkpointing",
        ]
        parts += (
            ["compiled"] * self.compile
            + ["channels last"] * self.channels_last
            + ["against others"] * self.compare
        )
        return ", ".join([*parts, f"micro-batch {self.micro_batch}"])

    @property
    def execution(self) -> Execution:
        """Execution settings of the module.

        The tolerance for |h| of the first batch is infinite, since with random weights the errors have an
        unusual size: |h| is recorded but not checked.
        """
        return Execution(
            PRECISION,
            half_frozen=True,
            gradient_checkpointing=self.checkpointing,
            compile=self.compile,
            compile_tolerance=math.inf,
            channels_last=self.channels_last,
        )


class TimedModule(PreferenceModule):
    """Training module with learning rate 0: it takes full steps, but its weights stay those of the base."""

    quiet, said = False, ""

    def log(self, *args, **kwargs) -> None:
        """Log, but not during another way's turn."""
        if not self.quiet:
            super().log(*args, **kwargs)

    def print(self, *args, **kwargs) -> None:
        """Keep the text for the results table."""
        self.said = " ".join(map(str, args))

    def cpu(self) -> TimedModule:
        """Stay on the device: Lightning would move the module to the CPU after each of the many fits."""
        return self

    def prepare(self, execution: Execution) -> None:
        """Reset the module for another setting, as if it had never been trained."""
        self.execution, self._untrained, self.said, self.quiet = execution, True, "", False
        self.zero_grad(set_to_none=True)
        self.take_figures()
        torch._dynamo.reset()
        networks: list[Any] = [self.policy, self._reference.network]
        for network in networks:
            if network is not None:
                network.disable_gradient_checkpointing()
                network.to(memory_format=torch.contiguous_format)
                for block in repeated_blocks(network):
                    block._compiled_call_impl = None


def configured(model: str) -> dict[str, Any]:
    """Arguments of PreferenceModule as in the model's configuration, but for a learning rate of 0."""
    known = MODELS[model]
    return {
        "objective": partial(capo, beta=known["beta"]),
        "lr": 0.0,
        "warm_up": 1,
        "weighting": Weighting("sigmoid", known["bias"]),
        "draw": known["draw"],
    }


def make_module(model: str, backbone: Backbone, lora: bool) -> TimedModule:
    """Module as in the model's configuration: capo, sigmoid weighting, gradient clipping at 1."""
    return TimedModule(
        backbone,
        **configured(model),
        lora=LORA if lora else None,
        gradient_clip=1.0,
        execution=Execution(PRECISION, half_frozen=True),
    )


def four_pass_loss(module: PreferenceModule, pairs: PreferenceBatch) -> Tensor:
    """Mean loss of a batch, as in `PreferenceModule`, but from four forward passes of B latents."""
    backbone = module.backbone
    t, errors = backbone.timesteps(pairs.u, module.draw), {}
    for place, kind in enumerate(("winner", "loser")):
        latents, noise = pairs.latents[:, place], pairs.noise[:, place]
        noisy, target = backbone.add_noise(latents, noise, t), backbone.target(latents, noise, t)
        predict = partial(backbone.predict, noisy=noisy, t=t, text=pairs.text)
        errors[f"policy_{kind}"] = denoising_error(predict(module.policy), target)
        with module.reference() as reference:
            errors[f"reference_{kind}"] = denoising_error(predict(reference), target)
    gap = pairs.calibrated_rewards[:, 0] - pairs.calibrated_rewards[:, 1]
    return module.objective(PairErrors(**errors, gap=gap, weight=module.weighting(backbone, t))).mean()


def published_loss(module: TimedModule, pairs: PreferenceBatch) -> Tensor:
    """Mean loss of B pairs as published trainers compute it, with images and prompts encoded in every step.

    VAE and text encoders are on the policy's device. The images are random.
    """
    backbone, count = module.backbone, len(pairs.u)
    height, width = (backbone.pipeline.vae_scale_factor * side for side in backbone.latent_shape[1:])
    pixels = torch.rand(2 * count, 3, height, width, device=pairs.u.device) * 2 - 1
    with backbone.visiting(pixels.device):  # VAE and text encoders are there already, so nothing moves
        latents = (
            torch.cat([backbone.encode_images(part) for part in pixels.split(VAE_BATCH)])
            .float()
            .unflatten(0, (count, 2))
        )
        text = backbone.encode_prompts(["a small red cat sits on a green wall"] * count)
    batch = PreferenceBatch(latents, pairs.noise, pairs.u, pairs.calibrated_rewards, text, pairs.prompt_ids)
    return module.objective(module.pair_errors(batch)).mean()


def other_ways(module: TimedModule) -> dict[str, Take]:
    """Other ways to take a step, with the weights and the optimizer of `capo`, to fit in memory."""
    return {
        BARE: lambda pairs: module.training_step(pairs, 0),
        FOUR: partial(four_pass_loss, module),
        PUBLISHED: partial(published_loss, module),
    }


class Clock(L.Callback):
    """Callback that times rounds of `ACCUMULATED` passes and an optimizer step, in turn with other ways.

    Attributes:
        rounds: way -> seconds of each of its rounds.
        plain: seconds of `capo`'s passes without the optimizer's step.
        stepping: seconds of `capo`'s passes with the optimizer's step.
        peaks: way -> peak bytes of its tensors, including the first round, which creates the optimizer's
            state.
        failed: way -> reason, if it failed.
        loss: last loss of `capo`.
    """

    def __init__(self, others: Mapping[str, Take], context: Callable[[], AbstractContextManager]):
        self.others, self.context = dict(others), context
        self.rounds: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
        self.plain: list[float] = []
        self.stepping: list[float] = []
        self.peaks: dict[str, int | None] = {}
        self.failed: dict[str, str] = {}
        self.loss = math.nan

    def on_train_start(self, trainer: L.Trainer, module: TimedModule) -> None:
        self._begin(module.device)

    def _begin(self, device: torch.device) -> None:
        forget_peak(device)
        self._since = now(device)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: TimedModule, batch: PreferenceBatch, index: int
    ) -> None:
        if index % ACCUMULATED == ACCUMULATED - 1:
            self._halfway = now(module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: TimedModule, outputs, batch: PreferenceBatch, index: int
    ) -> None:
        """After each optimizer step, record the round and give the other ways their turns.

        Raises RuntimeError for a loss that is not finite.
        """
        if index % ACCUMULATED != ACCUMULATED - 1:
            return
        end = now(module.device)
        self.plain.append((self._halfway - self._since) / (ACCUMULATED - 1))
        self.stepping.append(end - self._halfway)
        self._note(OURS, end - self._since, module.device)
        self.loss = float(outputs["loss"]) * ACCUMULATED
        if not math.isfinite(self.loss):
            raise RuntimeError(f"the loss is {self.loss}")
        module.quiet = True
        for name in list(self.others):
            self._turn(name, module, trainer.optimizers[0], batch)
        module.quiet = False
        self._begin(module.device)

    def _note(self, name: str, seconds: float, device: torch.device) -> None:
        self.rounds[name].append(seconds)
        peak = peak_bytes(device)
        self.peaks[name] = None if peak is None else max(peak, self.peaks.get(name) or 0)

    def _turn(self, name: str, module: TimedModule, optimizer: Optimizer, batch: PreferenceBatch) -> None:
        self._begin(module.device)
        try:
            with torch.enable_grad():
                self._round(self.others[name], module, optimizer, batch)
        except torch.OutOfMemoryError:
            module.zero_grad(set_to_none=True)
            del self.others[name]
            self.failed[name] = "out of memory"
            return
        self._note(name, now(module.device) - self._since, module.device)

    def _round(self, take: Take, module: TimedModule, optimizer: Optimizer, batch: PreferenceBatch) -> None:
        for _ in range(ACCUMULATED):
            with self.context():
                loss = take(batch)
            (loss / ACCUMULATED).backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        module.take_figures()

    def teardown(self, trainer: L.Trainer, module: TimedModule, stage: str) -> None:
        """Free the optimizer's state; Lightning would move it to the CPU first."""
        trainer.strategy.optimizers = []

    def on_exception(self, trainer: L.Trainer, module: TimedModule, exception: BaseException) -> None:
        """Free the optimizer's state where `teardown` is not called."""
        trainer.strategy.optimizers = []


def run_setting(
    setting: Setting, module: TimedModule, batch: PreferenceBatch, device: torch.device, rounds: int
) -> dict[str, object]:
    """Measure `rounds` rounds of a setting after one warm-up round.

    Returns `step_figures`, the seconds of the whole fit and what the module printed about its first batch.
    Raises torch.OutOfMemoryError, and RuntimeError for a loss that is not finite.
    """
    module.prepare(setting.execution)
    others = other_ways(module) if setting.compare else {}
    clock = Clock(others, lambda: torch.autocast(device.type, torch.bfloat16))
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=PRECISION,
        max_steps=rounds + 1,
        max_epochs=-1,
        accumulate_grad_batches=ACCUMULATED,
        logger=False,
        callbacks=[Curves(5), clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
    start = time.perf_counter()
    try:
        # torch's loaders take any sequence, their types a Dataset alone
        batches: Any = [batch] * (ACCUMULATED * (rounds + 1))
        trainer.fit(module, DataLoader(batches, batch_size=None))
    finally:
        module.zero_grad(set_to_none=True)
        module.trainer = None
    return {
        **step_figures(clock, setting.micro_batch),
        "fit_seconds": time.perf_counter() - start,
        "first_batch": module.said,
    }


def step_figures(clock: Clock, micro_batch: int) -> dict[str, object]:
    """Row of figures, from medians of all rounds but the first.

    Pairs per second are those of forward and backward passes alone, and with an optimizer step every 256
    pairs.
    """
    micro, stepping = (statistics.median(found[1:]) for found in (clock.plain, clock.stepping))
    optimizer = max(0.0, stepping - micro)
    found: dict[str, object] = {
        "pairs_per_second": micro_batch / micro,
        "pairs_per_second_256": PAPER_BATCH / (PAPER_BATCH / micro_batch * micro + optimizer),
        "micro_seconds": micro,
        "optimizer_seconds": optimizer,
        "peak_bytes": clock.peaks[OURS],
        "loss": clock.loss,
    }
    ours = clock.rounds[OURS][1:]
    for name in clock.rounds:
        if name in clock.failed:
            found[name] = clock.failed[name]
        elif name != OURS:
            theirs = clock.rounds[name][1:]
            found[f"{name} pairs_per_second"] = ACCUMULATED * micro_batch / statistics.median(theirs)
            found[f"faster than {name}"] = median_ratio(ours, theirs)
            found[f"{name} peak_bytes"] = clock.peaks[name]
    return found

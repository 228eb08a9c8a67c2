"""Take a few training steps on this machine; check policy = reference, the first loss, time and memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from capo.backbones import Backbone
from capo.data import PreferenceBatch
from capo.module import PreferenceModule
from capo.objectives import margin
from capo.objectives.base import at_reference, fields_of
from capo.preflight.model_check import Check

STEPS = 3  # the last one is timed
CHECKPOINTING = "trainer.gradient_checkpointing"
FASTER = 1.05  # from which speed-up a step without gradient checkpointing is worth its memory
LEAST_FREE = 0.1  # share of the device's memory that should stay free beside such a step
NEAR = 0.2  # largest relative difference between measured and planned memory


def step_batch(
    backbone: Backbone, latents: Tensor, captions: Sequence[str], pairs: int, group: int = 2
) -> PreferenceBatch:
    """Build a batch of `pairs` pairs, or groups, from known latents (B, C, h, w) and their captions.

    Winners are the latents, the others of a group the same latents with added noise; the gaps dR of winner
    and last loser range from 0.2 to 0.9, and rewards between them are evenly spaced.
    """
    draw = torch.Generator().manual_seed(0)
    rows = torch.arange(pairs) % len(latents)
    winners = latents[rows]
    losers = [winners + 0.3 * torch.randn(winners.shape, generator=draw) for _ in range(group - 1)]
    gaps = torch.linspace(0.2, 0.9, pairs)
    text = {
        key: value[rows.to(value.device)].cpu()
        for key, value in backbone.encode_prompts(list(captions)).items()
    }
    every = torch.stack([winners, *losers], dim=1)
    u = (torch.arange(pairs) + 0.5) / pairs
    rewards = 0.5 + gaps[:, None] * torch.linspace(0.5, -0.5, group)
    return PreferenceBatch(
        every,
        torch.randn(every.shape, generator=draw),
        u,
        rewards,
        text,
        [f"known {row}" for row in rows.tolist()],
    )


class Watch(L.Callback):
    """Record the first forward pass and the last step of a short fit.

    Attributes:
        largest: largest |margin h| of the first batch; NaN if the objective has no reference or no loser.
        loss: mean loss of the first batch; NaN as above.
        expected: mean of the objective with the policy's errors replaced by the reference's (h = 0); NaN as
            above.
        gap: mean reward gap dR of the first batch; NaN as above.
        seconds: duration of the last step.
        peak: peak GPU memory of the last step in bytes; None on a CPU.
    """

    def __init__(self) -> None:
        self.largest = self.loss = self.expected = math.nan
        self.gap = self.seconds = math.nan
        self.peak: int | None = None
        self._began = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: PreferenceModule, batch: PreferenceBatch, index: int
    ) -> None:
        if index == 0:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self._first(module, batch)
        if module.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def _first(self, module: PreferenceModule, batch: PreferenceBatch) -> None:
        errors = module.pair_errors(batch)
        if errors.reference_winner is None or errors.policy_loser is None:
            return
        (gap,) = fields_of(errors, "gap")
        self.largest, self.gap = float(margin(errors).abs().max()), float(gap.mean())
        known = errors, at_reference(errors)
        self.loss, self.expected = (float(module.objective(found).mean()) for found in known)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: PreferenceModule, outputs, batch, index: int
    ) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.seconds = time.perf_counter() - self._began


def take_steps(
    module: PreferenceModule, batch: PreferenceBatch, accelerator: str, precision: str
) -> Watch | None:
    """Train `module` on the same batch for STEPS steps and return the record; do not reuse the module.

    None: the device's memory is too small for a step.
    """
    watch = Watch()
    named: Any = precision  # one of the names that Lightning spells out as literals
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=named,
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        barebones=False,
    )
    batches: Any = [batch] * STEPS  # torch's loaders take any sequence, their types a Dataset alone
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None))
    except torch.OutOfMemoryError:
        return None
    return watch


def free_memory() -> None:
    """Free what the module of the last steps held, in cycles too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_checkpointing(found: Mapping[bool, Watch | None], now: bool, memory: int | None) -> list[Check]:
    """Compare steps with gradient checkpointing (`found[True]`) and without, and recommend one in a sentence.

    Args:
        found: records of both kinds of steps; None: out of memory. Nothing is said if one is missing.
        now: the configured kind.
        memory: the device's memory in bytes; None on a CPU, whose memory is not measured.
    """
    if len(found) < 2:
        return []
    told = ", ".join(f"{'on' if kind else 'off'}: {_measured(found[kind])}" for kind in (now, not now))
    best, reason = _recommended(found[True], found[False], memory)
    advice = f"{'keep' if best == now else 'set'} {CHECKPOINTING}={str(best).lower()}, {reason}"
    return [Check("gradient checkpointing", True, f"{told}: {advice}")]


def _measured(watch: Watch | None) -> str:
    if watch is None:
        return "out of memory"
    return f"{watch.seconds:.2f} s" + ("" if watch.peak is None else f" and {watch.peak / 1e9:.2f} GB")


def _recommended(on: Watch | None, off: Watch | None, memory: int | None) -> tuple[bool, str]:
    """Whether to use gradient checkpointing, and why; one of both kinds of steps fits."""
    if on is None or off is None:
        return off is None, "since a step does not fit otherwise"
    gain = on.seconds / off.seconds
    if gain < FASTER:
        return True, f"since a step without it is only {gain:.2f} x as fast and takes more memory"
    if memory is None or off.peak is None:
        return False, f"which is {gain:.2f} x as fast, if memory allows (it is measured on a GPU only)"
    free = 1 - off.peak / memory
    if free < LEAST_FREE:
        return True, f"since {free:.0%} of {memory / 1e9:.1f} GB would stay free without it"
    return False, f"which is {gain:.2f} x as fast and leaves {free:.0%} of {memory / 1e9:.1f} GB free"


def out_of_memory(found: Mapping[bool, Watch | None], pairs: int) -> Check:
    """Report that the configured step of `pairs` pairs does not fit; `found` as in `check_checkpointing`."""
    remedy = f"{CHECKPOINTING}=true" if found.get(True) else f"a smaller trainer.micro_batch (now {pairs})"
    if pairs == 1 and not found.get(True):
        remedy = f"{CHECKPOINTING}=true, experiment=lora, or trainer=fsdp on several devices"
    return Check("one step", False, f"out of memory with {pairs} pairs", remedy)


def check_steps(
    watch: Watch, planned_bytes: int | None, flops: float | None, pairs: int, rate: float | None = None
) -> list[Check]:
    """Turn the record of `take_steps` into checks.

    Args:
        watch: the record.
        planned_bytes: the plan's device memory for a step; None: not compared.
        flops: the plan's FLOPs for the same step; None: no speed is reported.
        pairs: number of pairs in the batch.
        rate: FLOP/s per device that the plan assumes; the planned seconds are reported but not judged.
    """
    checks = []
    if not math.isnan(watch.largest):
        same = watch.largest == 0
        checks.append(
            Check(
                "reference = policy",
                same,
                f"largest |h| of the first batch {watch.largest:.3g}, mean dR {watch.gap:.3f}",
                ""
                if same
                else "policy and reference compute differently at equal weights: "
                "trainer.compile=false, trainer.precision=32-true",
            )
        )
        near = abs(watch.loss - watch.expected) <= 1e-4 * max(abs(watch.expected), 1e-3)
        found = f"{watch.loss:.6f}, the objective at h = 0 is {watch.expected:.6f}"
        checks.append(Check("first loss", near, found, "" if near else "see reference = policy"))
    speed = _speed(watch.seconds, flops, pairs, rate)
    if watch.peak is None or planned_bytes is None:
        memory, fits = "memory is measured on a GPU only", True
    else:
        memory = f"peak {watch.peak / 1e9:.2f} GB, planned {planned_bytes / 1e9:.2f} GB"
        fits = abs(watch.peak / planned_bytes - 1) <= NEAR
    checks.append(
        Check(
            "one step",
            fits,
            f"{speed}; {memory}",
            "" if fits else "the plan is off by more than 20 % here: leave room, and report check.json",
        )
    )
    return checks


def _speed(seconds: float, flops: float | None, pairs: int, rate: float | None) -> str:
    told = f"{seconds:.2f} s for {pairs} pairs"
    if not flops:
        return told
    planned = f" (the plan: {flops / rate:.3g} s at {rate / 1e9:,.0f} GFLOP/s)" if rate else ""
    return f"{told}, {flops / seconds / 1e9:,.1f} GFLOP/s{planned}"

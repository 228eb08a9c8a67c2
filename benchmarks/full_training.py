"""Speed, memory and utilization of training steps of SDXL and SD3-Medium with random weights, by setting.

    python -m benchmarks.train_step --size full --model sdxl [--results FILE] [--minutes 9] [--rounds 3]
                                    [--only TEXT] [--plans]
    python -m benchmarks.train_step --size tiny --model sdxl --device cpu

Each setting gives a row of results, also when it runs out of memory. Rows are written as they are measured;
the same command resumes with the missing ones. `--plans` measures nothing: next to each measured peak it
writes the memory that `plan=true` states for that setting. It needs no GPU.

Pairs per second are given for forward and backward passes alone, and with an optimizer step every 256 pairs.
Utilization is the rate of the necessary operations (forward passes of policy and reference, and the policy's
backward pass, but not what checkpointing recomputes), relative to the vendor's dense bf16 peak, and relative
to the rate of a matrix product measured on the same device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.full_steps import LORA, PAPER_BATCH, PRECISION, Setting, TimedModule, make_module, run_setting
from benchmarks.machine import facts, release
from benchmarks.random_models import (
    TINY,
    conditioning_parts,
    random_backbone,
    random_module,
    random_pairs,
    sized_blueprint,
    sized_options,
)
from benchmarks.records import Records, Row, measured, print_rows
from capo.backbones import Backbone
from capo.backbones.lora import JOINT_ATTENTION
from capo.cli.process import prepare_process
from capo.preflight.architecture import Blueprint
from capo.preflight.memory import model_states
from capo.preflight.tracing import activation_bytes, adapter_of, denoiser_forward
from capo.runtime.optimizers import ADAMW

PRINTED = (
    "pairs_per_second",
    "pairs_per_second_256",
    "peak_bytes",
    "utilization",
    "of_matmul",
    "faster than published",
    "faster than four passes",
    "faster than bare loop",
)


def settings(model: str, size: str) -> list[Setting]:
    """Settings to measure, the most important first; all full policies before all LoRA policies."""
    if size == TINY:
        return [
            Setting(2),
            Setting(2, compare=True),
            Setting(1, checkpointing=False),
            Setting(1, compile=True),
            Setting(2, channels_last=model == "sdxl", lora=True),
        ]
    last = (
        [Setting(8, channels_last=True)] if model == "sdxl" else []
    )  # a transformer has hardly any convolutions
    full = [
        Setting(4),
        Setting(8),
        Setting(4, compare=True),
        Setting(1, checkpointing=False),
        Setting(2, checkpointing=False),
        Setting(16),
        *last,
        Setting(8, compile=True),
        Setting(1, checkpointing=False, compile=True),
        Setting(2),
        Setting(1),
    ]
    lora = [
        Setting(4, lora=True),
        Setting(8, lora=True),
        Setting(2, lora=True, checkpointing=False),
        Setting(8, lora=True, compile=True),
        Setting(4, lora=True, compare=True),
        Setting(4, lora=True, checkpointing=False),
        Setting(16, lora=True),
        Setting(1, lora=True, checkpointing=False),
        Setting(2, lora=True),
        Setting(1, lora=True),
    ]
    return full + lora


def lora_of(model: str, setting: Setting) -> dict | None:
    """Arguments of `add_lora` for a setting; None without LoRA."""
    if not setting.lora:
        return None
    return {**LORA, "targets": JOINT_ATTENTION} if model == "sd3" else LORA


def pair_flops(blueprint: Blueprint, lora: bool) -> float:
    """Floating-point operations of a pair: for two images, forward twice (policy, reference), backward once.

    The backward pass of a matrix product costs twice its forward pass, but only as much with frozen weights,
    which need no gradient.
    """
    once = denoiser_forward(blueprint, PRECISION, True)
    return 2 * (2 * once.flops + (1 if lora else 2) * once.weight_flops + 2 * once.attention_flops)


def utilization(row: Row, flops: float, about: Row) -> Row:
    """Add FLOP/s and utilization to a measured row; `about` holds the device's peak and measured rates."""
    if row["status"] != "measured":
        return row
    rate = flops * row["pairs_per_second_256"]
    peak = about["peak_flops"]
    return {
        **row,
        "flops": rate,
        "utilization": rate / peak if peak else None,
        "of_matmul": rate / about["matmul_flops"],
    }


def planned_bytes(blueprint: Blueprint, model: str, setting: Setting) -> int:
    """Device memory in bytes that the plan states for a setting."""
    lora = adapter_of(lora_of(model, setting))
    held = model_states(blueprint, lora, PRECISION, ADAMW, True, frozen_in=PRECISION)
    return held.total + activation_bytes(
        blueprint, 2 * setting.micro_batch, PRECISION, True, lora, setting.checkpointing, frozen_in=PRECISION
    )


def add_plans(records: Records, blueprint: Blueprint, model: str, wanted: Sequence[Setting]) -> None:
    """Add to every row the planned memory, and the measured peak as a multiple of it."""
    for setting in wanted:
        row = records.rows.get(setting.key)
        if row is None or setting.compile:  # the plan does not include what a compiler stores
            continue
        planned = planned_bytes(blueprint, model, setting)
        peak = row.get("peak_bytes")
        records.add(
            setting.key,
            {**row, "planned_bytes": planned, "peak_of_planned": peak / planned if peak else None},
        )
        print_rows(
            {setting.key: records.rows[setting.key]}, ("peak_bytes", "planned_bytes", "peak_of_planned")
        )


class Workshop:
    """Modules for the settings, and VAE and text encoders for the published way, created when needed."""

    def __init__(self, model: str, blueprint: Blueprint, device: torch.device):
        self.model, self.blueprint, self.device = model, blueprint, device
        self.module: TimedModule | None = None

    def module_for(self, setting: Setting) -> TimedModule:
        """Module with the policy that a setting needs; the device holds one at a time."""
        module = self.module
        if module is None or bool(module.lora) != setting.lora:
            module = self.module = None
            release(self.device)
            name = self.blueprint.denoiser_name
            base = random_backbone(self.model, {name: random_module(self.blueprint, name, self.device)})
            module = self.module = make_module(self.model, base, setting.lora)
            base.to("cpu")  # as in training: the reference is a copy in half precision
            release(self.device)
        self._conditioning(module.backbone, setting.compare)
        return module

    def _conditioning(self, backbone: Backbone, wanted: bool) -> None:
        # in half precision, which favors the published way, which runs them in every step
        empty = dict.fromkeys(["vae", *self.blueprint.encoder_names])
        parts = conditioning_parts(self.blueprint, self.device, torch.bfloat16) if wanted else empty
        backbone.pipeline.register_modules(**parts)
        release(self.device)


def measure(workshop: Workshop, setting: Setting, rounds: int) -> Row:
    """Measure a setting and return its row; afterwards the device holds only the policy and its reference."""

    def job() -> Row:
        module = workshop.module_for(setting)
        batch = random_pairs(workshop.blueprint, setting.micro_batch, workshop.device)
        return run_setting(setting, module, batch, workshop.device, rounds)

    row = measured(job)
    release(workshop.device)
    return row


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = sized_options(str(__doc__), "train", "timed, of two passes each", 3, 9.0)
    parser.add_argument("--only", default="", help="settings whose name has this text")
    parser.add_argument(
        "--plans", action="store_true", help="add planned memory to measured rows, and measure nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    began, args = time.monotonic(), options(arguments)
    prepare_process(args.threads)
    device, blueprint = torch.device(args.device), sized_blueprint(args.model, args.size)
    wanted = [setting for setting in settings(args.model, args.size) if args.only in setting.key]
    path = args.results or Path(__file__).parent / "results" / f"train_{args.model}_{args.size}.json"
    what = {"what": f"training step of {args.model} ({args.size})"}
    if args.plans:
        add_plans(Records(path, None), blueprint, args.model, wanted)
        return
    about = {**what, **facts(device), "pairs an optimizer step": PAPER_BATCH}
    records, workshop = Records(path, about), Workshop(args.model, blueprint, device)
    flops = {lora: pair_flops(blueprint, lora) for lora in (False, True)}
    print(f"{about}\nfigures in {path} and {path.with_suffix('.md').name}", flush=True)
    for setting in wanted:
        if setting.key in records.rows:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            print(f"{setting.key} and the following rows: not reached; the same command resumes here")
            return
        row = measure(workshop, setting, args.rounds)
        records.add(setting.key, utilization(row, flops[setting.lora], about))
        print_rows({setting.key: records.rows[setting.key]}, PRINTED)


if __name__ == "__main__":
    main()

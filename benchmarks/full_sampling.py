"""Images per second of SDXL and SD3-Medium with random weights, against the plain bf16 pipeline.

    python -m benchmarks.sampling --size full --model sdxl [--results FILE] [--minutes 9] [--rounds 2]
    python -m benchmarks.sampling --size tiny --model sdxl --device cpu

`capo` runs under bf16 autocast, its weights stored as `sampling.precision=bf16-mixed` stores them to sample a
pool, and decodes with the float32 VAE. `pipeline` has all weights in bf16. Both use the same batch size and
the paper's sampler (SDXL: DDIM, guidance 7.5; SD3: flow DPM-Solver, guidance 5; 50 steps), encode the text
and decode the images. They take turns. Rows and files are those of full_training.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.full_steps import PRECISION
from benchmarks.machine import facts, forget_peak, now, peak_bytes, release
from benchmarks.random_models import FULL, TINY, all_parts, random_backbone, sized_blueprint, sized_options
from benchmarks.records import Records, Row, measured, print_rows
from benchmarks.sampling_ways import our_sampling, plain_pipeline
from benchmarks.timing import median_ratio
from capo.backbones import Backbone
from capo.backbones.drawing import Drawing
from capo.backbones.sampling import SamplerSettings
from capo.cli.process import prepare_process
from capo.data.prompts import make_prompt
from capo.preflight.architecture import Blueprint
from capo.preflight.tracing import decoder_forward, denoiser_forward

PAPER = {"sdxl": (7.5, "DDIMScheduler"), "sd3": (5.0, "DPMSolverMultistepScheduler")}  # guidance and sampler
BATCHES = {FULL: (4, 8, 1, 16), TINY: (2, 1)}
STEPS = {FULL: 50, TINY: 4}
WARM = 2  # denoising steps of the warm-up calls
WAYS = {"capo": our_sampling, "pipeline": plain_pipeline}


def backbones(model: str, blueprint: Blueprint, device: torch.device) -> dict[str, Backbone]:
    """Backbones with the same weights: stored to draw under autocast for `capo`, in bf16 for `pipeline`."""
    parts, scheduler = all_parts(blueprint, device), PAPER[model][1]
    halved = {name: nn.Module.to(copy.deepcopy(part), torch.bfloat16) for name, part in parts.items()}
    return {
        "capo": random_backbone(model, parts, scheduler).prepare(Drawing(PRECISION)),
        "pipeline": random_backbone(model, halved, scheduler),
    }


def image_flops(blueprint: Blueprint, steps: int) -> float:
    """Floating-point operations of one image: both branches of guidance in every step, and the decoder."""
    return 2 * steps * denoiser_forward(blueprint, PRECISION, True).flops + decoder_forward(blueprint).flops


def draw(bases: dict[str, Backbone], settings: SamplerSettings, rounds: int, device: torch.device) -> Row:
    """Measure `rounds` calls of each way with one prompt, in turn, after one short warm-up call of each.

    Returns images per second, their ratio, and peak bytes, which include the weights of both backbones.
    Raises RuntimeError if a way returns a wrong number of images.
    """
    prompts, seconds, peaks = (
        [make_prompt("a small red cat sits on a green wall")],
        {name: [] for name in WAYS},
        {},
    )
    for name, job in WAYS.items():
        job(bases[name], prompts, replace(settings, steps=WARM))
    for _ in range(rounds):
        for name, job in WAYS.items():
            forget_peak(device)
            start = now(device)
            images = job(bases[name], prompts, settings)
            seconds[name].append(now(device) - start)
            peaks[name] = peak_bytes(device)
            if len(images) != settings.batch:
                raise RuntimeError(f"{name} generated {len(images)} images instead of {settings.batch}")
    return {
        "images_per_second": settings.batch / statistics.median(seconds["capo"]),
        "pipeline images_per_second": settings.batch / statistics.median(seconds["pipeline"]),
        "faster than pipeline": median_ratio(seconds["capo"], seconds["pipeline"]),
        "peak_bytes_of_both": peaks["capo"],
        "pipeline peak_bytes_of_both": peaks["pipeline"],
    }


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = sized_options(str(__doc__), "sample", "timed calls of each way", 2, 8.0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    began, args = time.monotonic(), options(arguments)
    prepare_process(args.threads)
    device, blueprint, steps = (
        torch.device(args.device),
        sized_blueprint(args.model, args.size),
        STEPS[args.size],
    )
    path = args.results or Path(__file__).parent / "results" / f"sample_{args.model}_{args.size}.json"
    guidance, sampler = PAPER[args.model]
    what = f"{args.model} ({args.size}), {sampler}, {steps} steps, guidance {guidance:g}"
    about = {"what": what, **facts(device)}
    records, flops = Records(path, about), image_flops(blueprint, steps)
    print(f"{about}\nfigures in {path} and {path.with_suffix('.md').name}", flush=True)
    bases = None
    for batch in BATCHES[args.size]:
        key = f"batch {batch}"
        if key in records.rows:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            print(f"{key} and the following rows: not reached; the same command resumes here")
            return
        bases = bases or backbones(args.model, blueprint, device)
        drawn = SamplerSettings(steps, guidance, batch, precision=PRECISION)
        row = measured(partial(draw, bases, drawn, args.rounds, device))
        release(device)
        if row["status"] == "measured":
            rate = flops * row["images_per_second"]
            row |= {
                "flops": rate,
                "utilization": rate / about["peak_flops"] if about["peak_flops"] else None,
                "of_matmul": rate / about["matmul_flops"],
            }
        records.add(key, row)
        print_rows({key: row}, ("images_per_second", "faster than pipeline", "utilization", "of_matmul"))


if __name__ == "__main__":
    main()

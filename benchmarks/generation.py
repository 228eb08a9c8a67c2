"""Images per second of a whole pool, from prompts to scores in files, and how long the device waits.

    python -m benchmarks.generation --size full --model sdxl [--results FILE] [--minutes 1.5] [--rounds 2]
    python -m benchmarks.generation --size tiny --model sdxl --device cpu

A pool of random weights is filled in a temporary folder as `generate.py` does it, under bf16 autocast. Two
rewards score it: a CLIP image tower in this process, and the mean level of the pixels in another one. The
images are drawn once. They are then scored in turn with the overlap of decoding and scoring (`capo`) and
without it (`one after another`), and scores must be equal.

`waits` is the share of the time in which the device had nothing to do: of a GPU, looked up every 2 ms; of a
CPU, the share of the threads' time in which this process did not compute. Rows and files are those of
full_training.py.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.full_sampling import PAPER, STEPS
from benchmarks.full_steps import PRECISION
from benchmarks.machine import Waits, facts, forget_peak, now, peak_bytes, release
from benchmarks.random_models import FULL, TINY, all_parts, random_backbone, sized_blueprint, sized_options
from benchmarks.random_scorers import tower
from benchmarks.records import Records, Row, measured, print_rows
from benchmarks.timing import median_ratio
from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
from capo.cli.process import prepare_process
from capo.data.engines import run_stage
from capo.data.generation import ImageGenerator, PoolSpec, open_pool, stages_of
from capo.data.pool import Pool
from capo.data.prompts import make_prompt
from capo.data.scoring import ScoreStage
from capo.data.stages import Stage
from capo.rewards import Reward

PROMPTS = ("a small red cat sits on a green wall", "two blue dogs near a round table")
CANDIDATES = {FULL: 8, TINY: 4}  # per prompt
BATCHES = {FULL: (4,), TINY: (2,)}
WAYS = {"capo": True, "one after another": False}  # whether decoding and scoring overlap


@dataclass
class Timed:
    """Seconds of runs of a stage, and the share of them in which the device waited."""

    seconds: list[float]
    waits: list[float]

    def add(self, stage: Stage, device: torch.device) -> None:
        """Run a stage and add its figures."""
        begun = now(device)
        with Waits(device) as watch:
            run_stage(stage, progress=False)
            ended = now(device)
        self.seconds.append(ended - begun)
        self.waits.append(watch.share)

    @property
    def second(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


def base(model: str, size: str, device: torch.device, settings: SamplerSettings) -> Backbone:
    """Backbone with random weights, stored as it draws; its parts are on the device only while they work."""
    blueprint = sized_blueprint(model, size)
    return (
        random_backbone(model, all_parts(blueprint, device), PAPER[model][1])
        .prepare(settings.drawing)
        .to(device)
    )


def rewards_of(size: str) -> list[Reward]:
    """A scorer in this process and one in another."""
    apart = {"_target_": "benchmarks.random_scorers.levels", "_partial_": True}
    return [Reward("tower", tower(size), needs_prompt=False), Reward("levels", apart, isolated=True)]


def fill(backbone: Backbone, settings: SamplerSettings, size: str, rounds: int, device: torch.device) -> Row:
    """Fill a pool, and score it `rounds` times each way, in turn, after one warm-up of each stage.

    Raises RuntimeError if the two ways give other scores.
    """
    rewards, prompts = rewards_of(size), [make_prompt(text) for text in PROMPTS]
    with tempfile.TemporaryDirectory() as root:
        spec = PoolSpec(Path(root), backbone.name, "train", 0, prompts, CANDIDATES[size])
        generator = ImageGenerator.base(backbone, settings)
        warm = replace(generator, settings=replace(settings, steps=2))
        small = replace(spec, split="warm", prompts=prompts[:1], candidates=settings.batch)
        for stage in stages_of(open_pool(small, warm), small, warm, rewards, False):
            run_stage(stage, progress=False)
        forget_peak(device)
        pool = open_pool(spec, generator)
        text, latents, scores = stages_of(pool, spec, generator, rewards, False)
        assert isinstance(scores, ScoreStage)  # the last of the three
        drawn = {stage.name: Timed([], []) for stage in (text, latents)}
        for stage in (text, latents):
            drawn[stage.name].add(stage, device)
        scored = {name: Timed([], []) for name in WAYS}
        found: dict[str, torch.Tensor] = {}
        for _ in range(rounds):
            for name, overlap in WAYS.items():
                shutil.rmtree(pool.folder / "scores", ignore_errors=True)
                scores.overlap = overlap
                scored[name].add(scores, device)
                found[name] = scores_of(pool, rewards, spec)
        if not torch.equal(*found.values()):
            raise RuntimeError("decoding ahead changed the scores")
    return figures(len(prompts) * spec.candidates, drawn, scored) | {"peak_bytes": peak_bytes(device)}


def scores_of(pool: Pool, rewards: Sequence[Reward], spec: PoolSpec) -> torch.Tensor:
    """All scores of a pool, read by a new reader of its files."""
    return Pool.open(pool.folder).scores([reward.key for reward in rewards], spec.candidates)


def figures(images: int, drawn: Mapping[str, Timed], scored: Mapping[str, Timed]) -> Row:
    """Rates of the whole pool, seconds by stage, and the shares in which the device waited."""
    ours, plain = scored.values()
    before = sum(timed.second for timed in drawn.values())
    whole = before + ours.second
    waited = sum(timed.second * statistics.median(timed.waits) for timed in (*drawn.values(), ours))
    return {
        "images_per_second": images / whole,
        "waits": waited / whole,
        **{f"{name} seconds": timed.second for name, timed in drawn.items()},
        "scores seconds": ours.second,
        "scores wait": statistics.median(ours.waits),
        "one after another, scores wait": statistics.median(plain.waits),
        "scores faster than one after another": median_ratio(ours.seconds, plain.seconds),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    began = time.monotonic()
    args = sized_options(str(__doc__), "generate", "timed runs of each way", 2, 1.5).parse_args(arguments)
    prepare_process(args.threads)
    device, steps, (guidance, sampler) = torch.device(args.device), STEPS[args.size], PAPER[args.model]
    path = args.results or Path(__file__).parent / "results" / f"generate_{args.model}_{args.size}.json"
    what = f"pool of {args.model} ({args.size}), {sampler}, {steps} steps, guidance {guidance:g}"
    records = Records(path, {"what": what, **facts(device)})
    print(f"{records.facts}\nfigures in {path} and {path.with_suffix('.md').name}", flush=True)
    for batch in BATCHES[args.size]:
        key = f"batch {batch}"
        if key in records.rows:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            print(f"{key} and the following rows: not reached; the same command resumes here")
            return
        settings = SamplerSettings(steps, guidance, batch, precision=PRECISION, decode=1)
        backbone = base(args.model, args.size, device, settings)
        records.add(key, measured(partial(fill, backbone, settings, args.size, args.rounds, device)))
        release(device)
        row = records.rows[key]
        print_rows({key: row}, [name for name in row if name != "status"])


if __name__ == "__main__":
    main()

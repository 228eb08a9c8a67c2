"""Checks that only a GPU can answer, on tiny models of the real classes with random weights.

    python -m benchmarks.gpu_checks --results FILE [--device cuda]

Each check is a row: policy and reference agree before the first step (margin 0), in float32 and under bf16
autocast, eager and compiled; capo's sampler gives the pipeline's images; a batch that does not fit the memory
is halved. An error that `records.measured` catches is a row too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.full_steps import configured
from benchmarks.machine import facts, release
from benchmarks.random_models import (
    MODELS,
    TINY,
    all_parts,
    random_backbone,
    random_module,
    random_pairs,
    sized_blueprint,
)
from benchmarks.records import Records, Row, measured, print_rows
from benchmarks.sampling import apart
from benchmarks.sampling_ways import our_sampling, plain_pipeline
from capo.backbones.parallel import compile_blocks
from capo.backbones.sampling import SamplerSettings
from capo.cli.process import prepare_process
from capo.data.prompts import make_prompt
from capo.module import Execution, PreferenceModule
from capo.objectives import margin
from capo.runtime.batching import FittingBatch

PRECISIONS = ("32-true", "bf16-mixed")
PRINTED = ("status", "passed", "found")


def first_margin(model: str, precision: str, compiled: bool, device: torch.device) -> Row:
    """Largest |h| of a first batch, which is 0 where policy and reference compute alike."""
    blueprint = sized_blueprint(model, TINY)
    name = blueprint.denoiser_name
    base = random_backbone(model, {name: random_module(blueprint, name, device)})
    module = PreferenceModule(base, **configured(model), execution=Execution(precision))
    module.policy.to(device)
    with module.reference() as reference:
        networks = (module.policy, reference.to(device))
    for network in networks if compiled else ():
        compile_blocks(network)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        largest = float(margin(module.pair_errors(random_pairs(blueprint, 4, device))).detach().abs().max())
    return {"passed": largest == 0 or (compiled and largest < 1e-5), "found": f"largest |h| {largest:.3g}"}


def sampler_against_pipeline(model: str, device: torch.device) -> Row:
    """Largest difference between our images and the pipeline's, in steps of 255, both in float32."""
    blueprint = sized_blueprint(model, TINY)
    parts = all_parts(blueprint, device)
    base, settings = random_backbone(model, parts), SamplerSettings(steps=4, guidance=4.0, batch=2)
    prompts = [make_prompt("a small red cat sits on a green wall")]
    difference = apart(our_sampling(base, prompts, settings), plain_pipeline(base, prompts, settings))
    return {"passed": difference <= 1, "found": f"images differ by {difference} of 255 at most"}


def memory_runs_out(device: torch.device) -> Row:
    """A batch of two that needs more memory than is free, and one image that needs a third of it."""
    if device.type != "cuda":
        return {"passed": None, "found": "only a GPU's memory runs out in this way"}
    third = torch.cuda.mem_get_info(device)[0] // 3
    batch = FittingBatch("the check", "choose a larger device")
    sizes = batch(
        lambda part: len(torch.empty((part.stop - part.start) * third, dtype=torch.int8, device=device)), 4
    )
    return {
        "passed": batch.largest in (1, 2) and sum(sizes) == 4 * third,
        "found": f"{batch.largest} at once fitted",
    }


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, check), what matters most first."""
    for model in MODELS:
        for precision in PRECISIONS:
            for compiled in (False, True):
                how = f"{model}, {precision}, {'compiled' if compiled else 'eager'}"
                yield f"first margin: {how}", partial(first_margin, model, precision, compiled, device)
        yield f"sampler: {model}", partial(sampler_against_pipeline, model, device)
    yield "out of memory", partial(memory_runs_out, device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks that the results file lacks."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--results", type=Path, required=True, help="json file; checks that it holds are not repeated"
    )
    parser.add_argument("--device", default="cuda", help="default cuda")
    args = parser.parse_args(arguments)
    prepare_process(None)
    device = torch.device(args.device)
    records = Records(args.results, {"what": "checks", **facts(device)})
    for name, check in checks(device):
        if name not in records.rows:
            records.add(name, measured(check))
            print_rows({name: records.rows[name]}, PRINTED)
            release(device)


if __name__ == "__main__":
    main()

"""Steps that reuse the reference's errors (`trainer.reuse_reference`), against steps that compute them.

    python -m benchmarks.reference_reuse [--batch 16] [--prompts 64] [--steps 5] [--runs 9] [--threads 2]
                                         [--model shapes_unet]

A first run on the batches keeps the errors in a pool of random latents. Then a run with another beta that
reuses them and the same run without them take turns in one process on the CPU: in each round, `steps` steps
of each; `runs` rounds after one for warm-up. The steps are those of the loader and the module, without
Lightning. The script prints medians, the median over rounds of the ratios, the bytes that a pair takes on
disk, and how far the weights of the two are apart at the end (0).
"""

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.configuration import model_and_sizes
from benchmarks.timing import in_turn, print_rates
from benchmarks.train_step import Bare, Steps, bare_losses, make_dataset, module_maker, stepping
from capo.cli.reuse import reference_settings
from capo.data.dataset import PairDataset
from capo.data.reference_errors import ReferenceErrors
from capo.training.loader import PreferenceData

REUSED, COMPUTED = "reused", "computed"


def steps_of(module: Bare, dataset: PairDataset, batch: int, known: ReferenceErrors | None) -> Steps:
    """Steps of a module on the dataset's batches, whose reference's errors may be known."""
    module.known = known
    return stepping(module, bare_losses(module, PreferenceData(dataset, batch, digests=known is not None)))


def time_steps(
    cfg: DictConfig, batch: int, steps: int, runs: int, folder: Path
) -> tuple[dict[str, list[float]], float, str]:
    """Seconds of the rounds of both ways, the largest difference of their weights, and what is on disk."""
    backbone = instantiate(cfg.model.backbone, name=cfg.model.name)
    dataset, make = make_dataset(cfg, backbone, folder), module_maker(cfg, backbone)
    first = make(Bare)
    settings = reference_settings(cfg, first)
    kept = ReferenceErrors(folder, settings)
    for _ in islice(steps_of(first, dataset, batch, kept), steps * (runs + 1)):
        pass
    kept.close()
    cfg.objective.beta /= 2
    modules, known = {name: make(Bare) for name in (REUSED, COMPUTED)}, ReferenceErrors(folder, settings)
    ways = {
        REUSED: steps_of(modules[REUSED], dataset, batch, known),
        COMPUTED: steps_of(modules[COMPUTED], dataset, batch, None),
    }
    jobs = {name: lambda way=way: list(islice(way, steps)) for name, way in ways.items()}
    seconds = in_turn(jobs, runs)
    if known.computed:
        raise RuntimeError(f"{known.computed} passes were not known")
    weights = zip(*(modules[name].policy.parameters() for name in (REUSED, COMPUTED)), strict=True)
    apart = max((one - other).abs().max().item() for one, other in weights)
    return seconds, apart, known.described


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    defaults = {"batch": 16, "prompts": 64, "steps": 5, "runs": 9, "threads": 2}
    args, cfg = model_and_sizes(str(__doc__), defaults, arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds, apart, disk = time_steps(cfg, args.batch, args.steps, args.runs, Path(folder))
    print(
        f"{args.model}, {args.batch} pairs a step, {args.threads} threads, "
        f"median of {args.runs} rounds of {args.steps} steps"
    )
    print_rates(seconds, args.batch * args.steps, "pairs", REUSED)
    print(f"on disk: {disk}")
    print(f"weights of {REUSED} and {COMPUTED} after their last step: {apart:g} apart at most")


if __name__ == "__main__":
    main()

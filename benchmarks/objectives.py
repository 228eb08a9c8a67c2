"""Processor time of a training step of each objective, beside that of `capo`.

    python -m benchmarks.objectives [--batch 16] [--prompts 64] [--steps 2] [--runs 9] [--threads 1]
                                    [--model shapes_unet]

All objectives of conf/objective/ take turns in one process on the CPU, on the same pairs: in each round,
`steps` steps of each; `runs` rounds after one for warm-up. The steps are those of the loader and the module,
with the reference that the objective takes by default, without Lightning. `capo_group` has groups of 4, as
many as others have pairs. The script prints medians, and the median over rounds of the ratio to `capo`, of
the seconds of all threads of the process, which another process on the same core hardly changes.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.configuration import model_and_sizes
from benchmarks.timing import in_turn, median_ratio
from benchmarks.train_step import Bare, Steps, bare_losses, make_dataset, module_maker, stepping
from capo.backbones import Backbone
from capo.cli.compose import composed
from capo.training.loader import PreferenceData

OURS = "capo"
OBJECTIVES = Path(__file__).parent.parent / "conf" / "objective"


def steps_of(cfg: DictConfig, backbone: Backbone, batch: int, folder: Path) -> Steps:
    """Steps of the objective of a configuration, on batches of the pool in `folder`."""
    data = PreferenceData(make_dataset(cfg, backbone, folder), batch)
    module = module_maker(cfg, backbone)(Bare)
    return stepping(module, bare_losses(module, data))


def time_steps(
    cfg: DictConfig, batch: int, steps: int, runs: int, folder: Path
) -> Mapping[str, Sequence[float]]:
    """Processor seconds of the rounds of each objective."""
    backbone = instantiate(cfg.model.backbone, name=cfg.model.name)
    sizes = [f"prompts.{split}={count}" for split, count in cfg.prompts.items() if isinstance(count, int)]
    jobs = {}
    for name in sorted(file.stem for file in OBJECTIVES.glob("*.yaml")):
        own = composed("train", [f"model={cfg.model.name}", *sizes, f"objective={name}"])
        way = steps_of(own, backbone, batch, folder)
        jobs[name] = lambda way=way: list(islice(way, steps))
    return in_turn(jobs, runs, time.process_time)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    defaults = {"batch": 16, "prompts": 64, "steps": 2, "runs": 9, "threads": 1}
    args, cfg = model_and_sizes(str(__doc__), defaults, arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds = time_steps(cfg, args.batch, args.steps, args.runs, Path(folder))
    print(
        f"{args.model}, {args.batch} pairs a step, {args.threads} threads, "
        f"median of {args.runs} rounds of {args.steps} steps"
    )
    width = max(map(len, seconds))
    print(f"{'':<{width}}  {'ms a step':>10}  {'of capo':>8}")
    for name, found in seconds.items():
        step, ratio = 1000 * statistics.median(found) / args.steps, median_ratio(seconds[OURS], found)
        print(f"{name:<{width}}  {step:>10.0f}  {ratio:>6.2f} x", flush=True)


if __name__ == "__main__":
    main()

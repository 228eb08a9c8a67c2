"""Images per second of capo's sampling, against a loop over the plain diffusers pipeline.

    python -m benchmarks.sampling [--prompts 4] [--batch 16] [--runs 5] [--threads 2] [--model shapes_unet]

`pipeline` is what a user would write: `pipe([prompt] * batch, ...)` for each prompt, with the same steps,
guidance, scheduler and noise, which returns PIL images. It is compared with:

- `sampling`: `capo.backbones.sampling.sample_prompts` and the pool's decoding, in memory, with each prompt
  encoded once.
- `pool`: `capo.data.generation.fill_pool`, as `generate.py` calls it, with a reward that costs nothing: the
  same images with all disk operations of a pool, such as locks, checksums and syncs.

Each makes `batch` images of each prompt, and they take turns. The script prints medians, the median over
rounds of the ratios, and the largest difference between the pixels of `sampling` and `pipeline` (without the
pool's float16).

With `--size full`: SDXL and SD3-Medium on a GPU (`full_sampling.py`).
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from PIL.Image import Image

from benchmarks.configuration import model_and_sizes
from benchmarks.sampling_ways import SEED, our_sampling, plain_pipeline
from benchmarks.timing import in_turn, print_rates
from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import Prompt
from capo.rewards import Reward


def free_reward(images: Sequence[Image], prompts: Sequence[str]) -> torch.Tensor:
    """Reward that is always 0 and costs nothing, for which a pool still decodes its images."""
    return torch.zeros(len(images))


def whole_pool(generator: ImageGenerator, prompts: Sequence[Prompt]) -> Callable[[], object]:
    """Job that fills a pool in a new temporary folder."""
    reward = Reward("free", free_reward, needs_prompt=False)

    def job() -> None:
        with tempfile.TemporaryDirectory() as root:
            plan = PoolSpec(
                Path(root), generator.backbone.name, "train", SEED, prompts, generator.settings.batch
            )
            fill_pool(plan, generator, [reward], progress=False)

    return job


def apart(ours: Sequence[Image], theirs: Sequence[Image]) -> int:
    """Largest difference between the pixels of two lists of images, as 8-bit values (0 to 255)."""
    pairs = zip(ours, theirs, strict=True)
    return max(
        int(np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)).max()) for a, b in pairs
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    if any(argument.startswith("--size") for argument in (sys.argv[1:] if arguments is None else arguments)):
        from benchmarks import full_sampling  # here, since it takes a while to import

        full_sampling.main(arguments)
        return
    defaults = {"prompts": 4, "batch": 16, "runs": 5, "threads": 2}
    args, cfg = model_and_sizes(str(__doc__), defaults, arguments)
    settings = SamplerSettings(**{**cfg.sampling, "batch": args.batch})
    backbone, prompts = (
        instantiate(cfg.model.backbone, name=cfg.model.name),
        instantiate(cfg.prompts)["train"],
    )
    backbone.pipeline.set_progress_bar_config(disable=True)
    jobs = {
        "sampling": lambda: our_sampling(backbone, prompts, settings),
        "pool": whole_pool(ImageGenerator.base(backbone, settings), prompts),
        "pipeline": lambda: plain_pipeline(backbone, prompts, settings),
    }
    difference = apart(jobs["sampling"](), jobs["pipeline"]())
    seconds = in_turn(jobs, args.runs)
    print(
        f"{args.model}, {args.prompts} prompts x {args.batch} images, {settings.steps} steps, guidance "
        f"{settings.guidance:g}, parallel={settings.parallel}, {args.threads} threads, "
        f"median of {args.runs} runs"
    )
    print_rates(seconds, args.prompts * args.batch, "images", "sampling")
    print(f"pixels of sampling and pipeline: {difference} of 255 apart at most")


if __name__ == "__main__":
    main()

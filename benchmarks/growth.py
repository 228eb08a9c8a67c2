"""Time and memory from a complete pool of a million prompts to the first training batch.

    python -m benchmarks.growth [--prompts 1000000] [--candidates 16] [--rewards 3] [--prompts_per_shard 512]
                                [--threads 2] [--pool FOLDER]

The pool is made first, with the functions of `capo.data.pool`, and is not timed; with `--pool` it is kept in
FOLDER and used again. Its files are real but their content is not: scores are random, and latents and text
embeddings are one number each, so that the files of a million prompts fit on a disk. The timed stages but
`status` are what `train.py` does with the prompts:

- `prompts`: read them from a text file and check for duplicates across splits.
- `what is there`: open the pool, look up the prompts, and check every text, latent and score file
  (`capo.data.generation.fill_pool`, which finds nothing to make).
- `status`: what `generate.py stage=status` looks up, files by stage, their times and sizes.
- `selection`: read the scores, calibrate and compare them, count pairs, and build the dataset
  (`capo.data.candidates.select_candidates`).
- `first batch`: order a whole epoch in the loader, and read the pairs of one batch from their files.

Loading the model and reading latents of real size are not included; `train_step.py` and `reading.py` time
them. Memory is the peak of the whole process; it includes making the pool if that was done in the same run.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.options import add_numbers
from benchmarks.synthetic import (
    numbered_prompts,
    numbers_generator,
    numbers_plan,
    synthetic_pool,
    synthetic_rewards,
)
from capo.data import PreferenceBatch
from capo.data.candidates import Candidates, select_candidates
from capo.data.generation import fill_pool, stages_of
from capo.data.pool_state import states_of
from capo.data.prompts import Prompt, check_splits, text_files
from capo.pairs import frs
from capo.training.loader import PreferenceData

BATCH = 16
GENERATOR = numbers_generator((1, 1, 1), {"prompt_embeds": (1,)})
Result = TypeVar("Result")


def peak_gib() -> float:
    """Peak resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stages:
    """Runs stages and prints wall-clock seconds, processor seconds and peak memory after each."""

    def __init__(self):
        self.seconds = 0.0
        print(f"{'':<16}{'seconds':>9}{'processor':>11}{'peak GiB':>10}")

    def __call__(self, name: str, stage: Callable[[], Result]) -> Result:
        start, processor = time.perf_counter(), time.process_time()
        result = stage()
        self.seconds += time.perf_counter() - start
        told = time.perf_counter() - start, time.process_time() - processor, peak_gib()
        print(f"{name:<16}{told[0]:>9.2f}{told[1]:>11.2f}{told[2]:>10.2f}", flush=True)
        return result


PROMPT = "a {} prompt"  # of a split other than train


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> dict[str, Path]:
    """Write a text file per split: `prompts` for training, one other prompt each for validation and test."""
    files = {split: folder / f"{split}.txt" for split in ("train", "validation", "test")}
    files["train"].write_text("\n".join(prompt.text for prompt in prompts))
    for split in ("validation", "test"):
        files[split].write_text(PROMPT.format(split))
    return files


def is_own(folder: Path) -> bool:
    """Whether a folder holds nothing but what this benchmark may replace: it is absent, empty or its own."""
    validation = folder / "validation.txt"
    if validation.is_file():
        return validation.read_text(errors="replace") == PROMPT.format("validation")
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def read_prompts(files: dict[str, Path]) -> list[Prompt]:
    """Read the training prompts and check them again, as `train.py` does with every kind of prompt set."""
    splits = text_files(**files)
    check_splits(splits)
    return splits["train"]


def make_pool(
    folder: Path, prompts: int, candidates: int, rewards: int, prompts_per_shard: int
) -> dict[str, Path]:
    """Write prompt files and a complete pool to `folder`, keeping existing files of the pool."""
    texts = numbered_prompts(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    files = write_prompts(folder, texts)  # first: by them the folder is known, should this be cut off
    plan = numbers_plan(folder, texts, candidates, prompts_per_shard)
    synthetic_pool(plan, GENERATOR, synthetic_rewards(rewards))
    return files


def start_training(
    files: dict[str, Path], candidates: int, rewards: int, prompts_per_shard: int
) -> tuple[Candidates, float]:
    """Run all stages from the prompt files to the first batch; returns the selection and total seconds."""
    stage, scored = Stages(), synthetic_rewards(rewards)
    prompts = stage("prompts", lambda: read_prompts(files))
    plan = numbers_plan(files["train"].parent, prompts, candidates, prompts_per_shard)
    pool = stage("what is there", lambda: fill_pool(plan, GENERATOR, scored, verify=False))

    def select() -> Candidates:
        found = select_candidates(
            pool, prompts, candidates, scored, frs, "win_rate", seed=0, shared_noise=False
        )
        found.selection.statistics()
        return found

    def first_batch() -> PreferenceBatch:
        return next(iter(PreferenceData(found.dataset, BATCH).train_dataloader()))

    work = stages_of(pool, plan, GENERATOR, scored, verify=False)
    stage("status", lambda: states_of(pool, work))
    found = stage("selection", select)
    stage("first batch", first_batch)
    return found, stage.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    defaults = {"prompts": 1_000_000, "candidates": 16, "rewards": 3, "prompts_per_shard": 512, "threads": 2}
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add_numbers(parser, defaults)
    parser.add_argument(
        "--pool", type=Path, help="folder where the pool is made and kept; default: a temporary folder"
    )
    args = parser.parse_args(arguments)
    if args.pool and not is_own(args.pool):
        parser.error(
            f"--pool {args.pool}: it holds files that this benchmark did not write; give another folder"
        )
    torch.set_num_threads(args.threads)
    sizes = args.candidates, args.rewards, args.prompts_per_shard
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        files = make_pool(args.pool or Path(temporary), args.prompts, *sizes)
        print(
            f"{args.prompts} prompts x {args.candidates} candidates x {args.rewards} rewards, "
            f"{args.threads} threads; the pool was made in {time.perf_counter() - start:.0f} s, not counted"
        )
        found, seconds = start_training(files, *sizes)
    usable = found.selection.statistics().usable
    print(f"in all {seconds:.1f} s and {peak_gib():.2f} GiB (aims: 60 s, 8 GiB); {usable} prompts have pairs")


if __name__ == "__main__":
    main()

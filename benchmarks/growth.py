"""Seconds and memory from a complete pool of a million prompts to the first batch of training.

    python benchmarks/growth.py [--prompts 1000000] [--candidates 16] [--rewards 3] [--prompts_per_shard 512]
                                [--threads 2] [--pool FOLDER]

The pool is made first, by the pool's own functions, and not counted; with `--pool` it stays in FOLDER and is found
again. Everything in it is real but for its contents: scores are random, and latents and texts are one number each,
so that the files of a million prompts fit on a disk. What is counted is what `train.py` does with the prompts:

- `prompts`: read from a text file, checked for duplicates over the splits.
- `what is there`: the pool is opened, the prompts are looked up, and every text, latent and score file is looked at
  (`capo.data.generation.fill_pool`, which finds nothing to make).
- `selection`: the scores are read, calibrated, compared, pairs are counted, and the dataset is built
  (`capo.data.candidates.select_candidates`).
- `first batch`: the loader's first order of a whole epoch, and the pairs of one batch read from their files.

Loading the model and reading latents of real size are not in it; `train_step.py` and `reading.py` time those. The
memory is the peak of the whole process, making the pool included where it was made in the same run.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from capo.data import PreferenceBatch
from capo.data.candidates import Candidates, select_candidates
from capo.data.generation import fill_pool
from capo.data.prompts import Prompt, check_splits, text_files
from capo.pairs import frs
from capo.training.loader import PreferenceData
from synthetic import numbered_prompts, numbers_generator, numbers_plan, synthetic_pool, synthetic_rewards

BATCH = 16
GENERATOR = numbers_generator((1, 1, 1), {"prompt_embeds": (1,)})
Result = TypeVar("Result")


def peak_gib() -> float:
    """Largest memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stages:
    """Runs one stage after another and prints what each took."""

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


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> dict[str, Path]:
    """A text file a split: all of `prompts` to train on, one other to validate and one to test."""
    files = {split: folder / f"{split}.txt" for split in ("train", "validation", "test")}
    files["train"].write_text("\n".join(prompt.text for prompt in prompts))
    for split in ("validation", "test"):
        files[split].write_text(f"a {split} prompt")
    return files


def read_prompts(files: dict[str, Path]) -> list[Prompt]:
    """The training prompts, checked again as `train.py` does with every kind of prompt set."""
    splits = text_files(**files)
    check_splits(splits)
    return splits["train"]


def make_pool(
    folder: Path, prompts: int, candidates: int, rewards: int, prompts_per_shard: int
) -> dict[str, Path]:
    """Prompt files and a complete pool in `folder`; what is there already stays."""
    texts = numbered_prompts(prompts)
    plan = numbers_plan(folder, texts, candidates, prompts_per_shard)
    synthetic_pool(plan, GENERATOR, synthetic_rewards(rewards))
    return write_prompts(folder, texts)


def start_training(
    files: dict[str, Path], candidates: int, rewards: int, prompts_per_shard: int
) -> tuple[Candidates, float]:
    """Everything from the prompt files to the first batch; what was selected, and the seconds of all stages."""
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

    found = stage("selection", select)
    stage("first batch", first_batch)
    return found, stage.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    defaults = {"prompts": 1_000_000, "candidates": 16, "rewards": 3, "prompts_per_shard": 512, "threads": 2}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--pool", type=Path, help="where the pool is made and kept; default: a temporary folder"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sizes = args.candidates, args.rewards, args.prompts_per_shard
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        files = make_pool(args.pool or Path(temporary), args.prompts, *sizes)
        print(
            f"{args.prompts} prompts x {args.candidates} candidates x {args.rewards} rewards, {args.threads} threads; "
            f"the pool was made in {time.perf_counter() - start:.0f} s, not counted"
        )
        found, seconds = start_training(files, *sizes)
    usable = found.selection.statistics().usable
    print(f"in all {seconds:.1f} s and {peak_gib():.2f} GiB (aims: 60 s, 8 GiB); {usable} prompts have pairs")


if __name__ == "__main__":
    main()

"""Pairs per second read at random from a pool, against memory-mapped arrays of the same data.

    python -m benchmarks.reading [--prompts 512] [--prompts_per_shard 8] [--visits 4096] [--batch 16]
                                 [--runs 7] [--threads 2]

- `pool`: `PoolReader`, which reads safetensors shards with a limited number of open files.
- `memmap`: one .npy file for all latents and one for each text tensor, each mapped once.

Both read the same pairs in the same order and collate them in the same way, in two measurements. `training
loader` is the loader that training uses, on either storage, with all that a step waits for, such as drawing
the pair and its noise. `storage alone` only reads two latents and the text and stacks them. Everything is in
the page cache. The tensors have the shapes of the shapes world (latents 8x16x16 in float16, 8 KB of text per
prompt), with 16 candidates per prompt. The script prints median speeds, and the pool's speed relative to
memmap's (the median over rounds). In the first epoch of the pool, every file is opened for the first time and
its checksum computed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import add_numbers
from benchmarks.synthetic import (
    numbered_prompts,
    numbers_generator,
    numbers_plan,
    synthetic_pool,
    synthetic_rewards,
)
from benchmarks.timing import in_turn, median_ratio
from capo.data.candidates import select_candidates
from capo.data.dataset import PairDataset, VisitSampler, visit_generator
from capo.data.pool import Pool
from capo.pairs import frs
from capo.training.loader import PreferenceData

CANDIDATES = 16
LATENT = (8, 16, 16)
TEXT = {"prompt_embeds": (20, 96), "pooled_prompt_embeds": (64,), "time_ids": (6,)}
Visit = tuple[int, list[int]]  # position, (winner, loser)


class MappedArrays:
    """Memory-mapped arrays of a pool's latents (P, N, C, H, W) and text (P, ...); methods of PoolReader."""

    def __init__(self, folder: Path):
        # plain views, since each indexing of the subclass np.memmap costs microseconds
        arrays = {path.stem: np.load(path, mmap_mode="r").view(np.ndarray) for path in folder.glob("*.npy")}
        self._latents, self._text = arrays.pop("latents"), arrays

    def latents(self, position: int, candidates: Sequence[int]) -> Tensor:
        """Latents (k, C, H, W) float16 of the given candidates."""
        return torch.from_numpy(self._latents[position, list(candidates)])

    def text(self, position: int) -> dict[str, Tensor]:
        """Text tensors of a prompt, without a batch dimension."""
        return {name: torch.from_numpy(array[position].copy()) for name, array in self._text.items()}


def make_dataset(folder: Path, prompts: int, prompts_per_shard: int) -> tuple[Pool, PairDataset]:
    """Make a pool of random numbers and select pairs in it."""
    rewards, texts = synthetic_rewards(3), numbered_prompts(prompts)
    plan = numbers_plan(folder, texts, CANDIDATES, prompts_per_shard)
    pool = synthetic_pool(plan, numbers_generator(LATENT, TEXT), rewards)
    return pool, select_candidates(pool, texts, CANDIDATES, rewards, frs, "win_rate", 0, False).dataset


def write_arrays(pool: Pool, folder: Path) -> None:
    """Write all latents and all text of the pool as .npy files."""
    texts = [pool.read_text(row) for row in pool.text_shards()]
    arrays = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
    rows = [
        [pool.read_latents(shard) for shard in pool.row_shards(row, CANDIDATES)] for row in pool.text_shards()
    ]
    arrays["latents"] = torch.cat([torch.cat(blocks, dim=1) for blocks in rows])
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.numpy())


def over(reader: MappedArrays, dataset: PairDataset) -> PairDataset:
    """Dataset of the same pairs, read from another storage."""
    return PairDataset(reader, dataset.positions, dataset.prompts, dataset.selection, dataset.seed)


def loading(dataset: PairDataset, batch: int, steps: int) -> Callable[[], Tensor]:
    """Job that takes the first `steps` batches of the training loader and returns the last one's latents."""

    def job() -> Tensor:
        *_, last = islice(PreferenceData(dataset, batch).train_dataloader(), steps)
        return last.latents

    return job


def access(reader, visits: Sequence[Visit], batch: int) -> Callable[[], Tensor]:
    """Job that reads all visits, stacks them in batches and returns the latents of the last batch."""

    def job() -> Tensor:
        for start in range(0, len(visits), batch):
            part = visits[start : start + batch]
            latents = torch.stack([reader.latents(*visit) for visit in part]).float()
            texts = [reader.text(position) for position, _ in part]
            {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
        return latents

    return job


def visited(dataset: PairDataset, batch: int, steps: int) -> list[Visit]:
    """Visits that the first `steps` batches of the training loader read."""
    sampler = VisitSampler(dataset.selection.usable.nonzero().flatten().tolist(), dataset.seed, batch)
    visits = []
    for row, visit, _ in (key for keys in islice(sampler, steps) for key in keys):
        draw = visit_generator(dataset.seed, dataset.prompts[row].id, visit)
        visits.append((dataset.positions[row], list(dataset.selection.draw(row, draw.integers))))
    return visits


def time_reading(folder: Path, prompts: int, prompts_per_shard: int, batch: int, steps: int, runs: int):
    """Seconds of each run by (measurement, storage), seconds of the first epoch, and the number of files.

    Raises RuntimeError if the storages return different latents.
    """
    pool, dataset = make_dataset(folder, prompts, prompts_per_shard)
    write_arrays(pool, folder)
    arrays, visits = MappedArrays(folder), visited(dataset, batch, steps)
    start = time.perf_counter()
    loading(dataset, batch, prompts // batch)()
    first = time.perf_counter() - start
    jobs = {
        ("training loader", "pool"): loading(dataset, batch, steps),
        ("training loader", "memmap"): loading(over(arrays, dataset), batch, steps),
        ("storage alone", "pool"): access(dataset.reader, visits, batch),
        ("storage alone", "memmap"): access(arrays, visits, batch),
    }
    expected, *others = (job() for job in jobs.values())
    if not all(torch.equal(expected, other) for other in others):
        raise RuntimeError("pool and arrays do not give the same latents")
    return in_turn(jobs, runs), first, len(list(pool.folder.rglob("*.safetensors")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    defaults = {"prompts": 512, "prompts_per_shard": 8, "visits": 4096, "batch": 16, "runs": 7, "threads": 2}
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add_numbers(parser, defaults)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    steps, epoch = args.visits // args.batch, args.prompts // args.batch * args.batch
    with tempfile.TemporaryDirectory() as folder:
        sizes = args.prompts, args.prompts_per_shard, args.batch, steps, args.runs
        seconds, first, files = time_reading(Path(folder), *sizes)
    pairs = steps * args.batch
    print(
        f"{args.prompts} prompts x {CANDIDATES} candidates in {files} files, {pairs} visits, "
        f"{args.threads} threads, median of {args.runs} runs"
    )
    print(f"{'':<15}{'pool':>16}{'memmap':>16}  pool reaches")
    for kind in dict.fromkeys(kind for kind, _ in seconds):
        pool, memmap = seconds[kind, "pool"], seconds[kind, "memmap"]
        rates = "".join(f"{pairs / median(found):>8.0f} pairs/s" for found in (pool, memmap))
        print(f"{kind:<15}{rates}  {median_ratio(pool, memmap):.0%} of memmap", flush=True)
    print(f"{'first epoch':<15}{epoch / first:>8.0f} pairs/s")


if __name__ == "__main__":
    main()

"""Processor time of a pool that is filled by `engine=ray`, against the same pool by `engine=local`.

    python -m benchmarks.engine_cost [--prompts 96] [--candidates 4] [--prompts_per_shard 4] [--workers 2]
                                     [--runs 3] [--files 2000] [--threads 1] [--model shapes_unet]

Text, images and scores of a pool are made by each engine in turn, `runs` times, each time anew: by `workers`
processes of `engine=local`, and by as many workers of a stage. The pools must be equal to the byte. Time is
processor time, user and system, and it is split by who spends it:

- `text`, `latents`, `scores`: the thread that makes a shard, from its begin to its end; medians. Both engines
  do the same there, so a difference is that of the moment: caches and cores are shared with other work.
- `around`: all else that the processes spend from the end of a shard to the end of the next one: locks,
  looking whether it is there, Ray's calls and threads. What precedes the first shard (imports, loading) is
  told as the start of a worker, and does not grow with the pool.
- `driver`: the thread of the process that decides, while the pool is filled: looking for what is missing,
  starting workers, submitting, waiting, progress. Starting the cluster is not in it.
- `Ray's threads`, `daemons`: the other threads of that process; raylet, GCS and agents. They also work while
  nothing happens: their time goes by the second of wall time rather than by shard.

A shard here is one of each stage: a text, a block of latents and its scores. What the engine adds is the last
three and what is more around shards, relative to the whole of `engine=local`. Before that the driver is
measured alone, with `files` tasks that take no time. Figures are medians of the rounds so far.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from benchmarks.configuration import model_and_sizes
from benchmarks.driver_time import Clock, driver_alone
from benchmarks.processor_time import descendants, settle, spent
from capo.cli.build import Components, build_components
from capo.cli.engines import StageBuilder
from capo.cli.process import prepare_process
from capo.data.engines import Engine, LocalEngine
from capo.data.engines.on_ray import RayEngine
from capo.data.engines.ray_cluster import PULSE, connect
from capo.data.engines.schedule import Room
from capo.data.generation import STAGES, PoolSpec, fill_pool
from capo.data.pool import Pool
from capo.data.stages import Order, Stage
from capo.runtime.threads import OPERATIONS

AROUND, DRIVER, THREADS, DAEMONS = "around", "driver", "Ray's threads", "daemons"
ADDED = {"without daemons": (DRIVER, THREADS), "in all": (DRIVER, THREADS, DAEMONS)}
WORKERS = ("ray::IDLE", "ray::StageActor")  # how the names of processes begin that work
DEFAULTS = {
    "prompts": 96,
    "candidates": 4,
    "prompts_per_shard": 4,
    "workers": 2,
    "runs": 3,
    "files": 2000,
    "threads": 1,
}


def watched(stage: Stage, notes: Path) -> Stage:
    """Let a stage note processor times of its process and thread, at the begin and the end of each shard."""
    run, file = stage.run, notes / f"{stage.name}-{os.getpid()}"

    def noted(shard: Any, report: Any) -> None:
        times = [time.process_time(), time.thread_time()]
        run(shard, report)
        times += [time.process_time(), time.thread_time()]
        with file.open("a") as out:
            out.write(f"{' '.join(map(str, times))}\n")

    stage.run = noted
    return stage


@dataclass(frozen=True)
class WatchedStages:
    """Builds the stages of the configured model, each of which notes its time in the folder `notes`."""

    build: StageBuilder
    notes: Path

    def __call__(self, order: Order) -> Stage:
        return watched(self.build(order), self.notes)


@dataclass
class Cost:
    """Processor seconds of a pool.

    Attributes:
        shard: seconds a shard, by who spends them.
        starts: seconds of each worker before its first shard.
        wall: seconds that Ray took.
    """

    shard: dict[str, float]
    starts: list[float] = field(default_factory=list)
    wall: float = 0.0


def read_notes(notes: Path) -> Cost:
    """Seconds of each stage by shard, around shards, and of each worker's start, from what stages noted."""
    cost = Cost({AROUND: 0.0})
    for stage in STAGES:
        files = [file.read_text().splitlines() for file in notes.glob(f"{stage}-*")]
        made = [[tuple(map(float, line.split())) for line in lines] for lines in files]
        rest = [
            (later[2] - before[2])
            - (later[3] - later[1])  # of the process, less that of the thread in the shard
            for shards in made
            for before, later in itertools.pairwise(shards)
        ]
        if not rest:
            raise RuntimeError(f"{stage}: no worker made two shards; make more, or with fewer workers")
        cost.shard[stage] = statistics.median(shard[3] - shard[1] for shards in made for shard in shards[1:])
        cost.shard[AROUND] += statistics.fmean(rest)
        cost.starts += [shards[0][0] for shards in made]
    return cost


def added(local: Cost, ray: Cost, *rows: str) -> float:
    """Share of what `engine=local` spends that Ray adds: around shards, and in `rows`."""
    more = ray.shard[AROUND] - local.shard[AROUND] + sum(ray.shard[row] for row in rows)
    return more / sum(local.shard.values())


def fill_locally(config: str, args: Any, root: Path) -> None:
    """Make what the pool lacks by `engine=local` in this process, one of several."""

    class Watched:
        def run(self, stages: Sequence[Stage], progress: bool = True) -> None:
            LocalEngine().run([watched(stage, root) for stage in stages], progress)

    cfg = OmegaConf.create(config)
    assert isinstance(cfg, DictConfig)
    prepare_process(args.threads)
    Work(cfg, args).fill(root, Watched())


class Work:
    """The pool to fill, and what was spent on it by each engine."""

    def __init__(self, cfg: DictConfig, args: Any):
        self.cfg, self.args = cfg, args
        self.components: Components = build_components(cfg, watching=False)
        self.shards = -(-args.prompts // args.prompts_per_shard)

    def _spec(self, root: Path) -> PoolSpec:
        own = self.components.pool_specs["train"]
        return replace(
            own, root=root, candidates=self.args.candidates, prompts_per_shard=self.args.prompts_per_shard
        )

    def fill(self, root: Path, engine: Engine) -> Pool:
        generator = replace(self.components.generator, engine=engine)
        return fill_pool(self._spec(root), generator, self.components.rewards, progress=False)

    def local(self, root: Path) -> tuple[Cost, Pool]:
        """Fill the pool by `engine=local` in as many new processes as Ray has workers of a stage."""
        root.mkdir()
        given = OmegaConf.to_yaml(self.cfg, resolve=True), self.args, root
        fresh = get_context("spawn")
        processes = [fresh.Process(target=fill_locally, args=given) for _ in range(self.args.workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return read_notes(root), self.fill(root, LocalEngine())

    def ray(self, root: Path) -> tuple[Cost, Pool]:
        """Fill the pool by `engine=ray`, on a cluster of its own with a device for each worker of a stage."""
        root.mkdir()
        threads, workers = self.args.threads, self.args.workers
        ray = connect("local", num_cpus=workers * threads)
        build = WatchedStages(StageBuilder(OmegaConf.to_yaml(self.cfg, resolve=True), None, threads), root)
        rooms = {stage: Room(1, 1 if stage == "text" else workers) for stage in STAGES}
        cost = Cost({})

        class Measured:
            def run(self, stages: Sequence[Stage], progress: bool = True) -> None:
                settle()
                others, began = descendants(os.getpid()), Clock()
                RayEngine(build, "local", 1, 600.0, threads, rooms).run(stages, progress)
                cost.shard[DRIVER], cost.shard[THREADS], cost.wall = began.passed()
                found = spent(others, descendants(os.getpid()))
                cost.shard[DAEMONS] = sum(
                    seconds for name, seconds in found.items() if not name.startswith(WORKERS)
                )

        try:
            pool = self.fill(root, Measured())
        finally:
            ray.shutdown()
        made = read_notes(root)
        outside = {name: seconds / self.shards for name, seconds in cost.shard.items()}
        return Cost(made.shard | outside, made.starts, cost.wall), pool


def contents(pool: Pool) -> dict[str, bytes]:
    """Bytes of all files of a pool by name, without its locks."""
    files = [path for path in pool.folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(pool.folder)): path.read_bytes() for path in files}


def print_costs(local: Sequence[Cost], ray: Sequence[Cost], shards: int) -> None:
    """Print medians of the rounds."""
    print(f"{'ms a shard':<16}{'local':>9}{'ray':>9}")
    for row in (*STAGES, AROUND, DRIVER, THREADS, DAEMONS):
        found = [[1e3 * cost.shard[row] for cost in costs if row in cost.shard] for costs in (local, ray)]
        print(f"{row:<16}" + "".join(f"{statistics.median(each) if each else 0:>9.1f}" for each in found))
    for told, rows in ADDED.items():
        shares = [added(*costs, *rows) for costs in zip(local, ray, strict=True)]
        print(f"added, {told}: {', '.join(f'{share:.1%}' for share in shares)}")
    for row in (THREADS, DAEMONS):
        rate = statistics.median(shards * cost.shard[row] / cost.wall for cost in ray)
        print(f"{row}: {1e3 * rate:.1f} ms a second of wall time")
    starts = [start for cost in ray for start in cost.starts]
    print(
        f"start of a worker: {statistics.median(starts):.1f} s, {len(starts)} starts in {len(ray)} runs, "
        f"of {statistics.median(cost.wall for cost in ray):.0f} s of wall time each",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the engines as the command line asks, and print the figures."""
    args, cfg = model_and_sizes(str(__doc__), DEFAULTS, arguments)
    own, threads, look = driver_alone(args.files, args.workers)
    print(
        f"driver alone, {args.files} tasks that take no time: {own:.2f} ms a file in its own thread, "
        f"{threads:.2f} ms with Ray's threads (aim 2)\n"
        f"{look:.2f} ms each {PULSE:g} s in which nothing happens",
        flush=True,
    )
    costs: dict[str, list[Cost]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as temporary:
        cfg.run_dir, cfg.threads = temporary, args.threads
        cfg.sampling.parallel = OPERATIONS  # in the thread that makes the shard
        work = Work(cfg, args)
        fills = {"local": work.local, "ray": work.ray}
        print(
            f"{args.model}, {work.shards} shards of {args.prompts_per_shard * args.candidates} images, "
            f"{args.workers} workers of latents and of scores, {args.threads} threads each",
            flush=True,
        )
        for run in range(args.runs):
            pools = {}
            for name in list(fills)[:: 1 if run % 2 == 0 else -1]:
                cost, pools[name] = fills[name](Path(temporary) / f"{name}-{run}")
                costs[name].append(cost)
            if contents(pools["local"]) != contents(pools["ray"]):
                raise RuntimeError("the pools of the two engines are not the same")
            print(f"\nafter round {run + 1}; the pools are equal to the byte; load {os.getloadavg()[0]:.1f}")
            print_costs(costs["local"], costs["ray"], work.shards)


if __name__ == "__main__":
    main()

"""Run evaluate.py benchmark=NAME: draw a benchmark for a policy and its base, or read official results."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo.backbones.export import find_policy, is_whole
from capo.cli.build import base_of, built, family_of, is_negative, sampler_settings, tuned_generator, use_base
from capo.cli.engines import check_engine, engine_of
from capo.cli.named_rewards import benchmark_place, rewards_of
from capo.cli.process import prepare_process
from capo.cli.readiness import check_accelerator, check_reward_weights, check_unconditional, check_weights
from capo.cli.run_config import run_config
from capo.cli.values import plain
from capo.data.generation import ImageGenerator, PoolSpec
from capo.data.images import GeneratedImages
from capo.errors import InputError
from capo.evaluation.benchmarks import Benchmark
from capo.evaluation.benchmarks.scores import Row, summary
from capo.evaluation.benchmarks.table import BenchmarkTable, Shown
from capo.evaluation.benchmarks.tree import IMAGES, README, claim, readme, write_seeds, write_tree
from capo.rewards import Reward
from capo.runtime.files import put_back, write_json, write_whole
from capo.runtime.launch import launch
from capo.runtime.run_folder import BENCHMARKS, POLICY, POOLS, RESULTS
from capo.runtime.terminal import Terminal

console = Terminal()
BASE = "base"  # row of the base; that of the policy is called POLICY
OFFICIAL = "official"  # folder of the tables of official results
CARDS, CARD_IMAGES = 12, 4  # prompts on the page, and images of each


@dataclass(frozen=True)
class Drawing:
    """What is drawn and scored here, where it goes, and the command line's overrides."""

    cfg: DictConfig
    benchmark: Benchmark
    rewards: Sequence[Reward]
    folder: Path
    overrides: Sequence[str]

    def spec(self, root: Path) -> PoolSpec:
        """Pool of one model under `root`."""
        cfg, held = self.cfg, self.benchmark
        return PoolSpec(
            root,
            cfg.model.name,
            held.name,
            cfg.benchmark.seed,
            held.drawn,
            held.images,
            cfg.pool.prompts_per_shard,
            compared=False,
        )

    def filled(self, generator: ImageGenerator, root: Path) -> GeneratedImages:
        """Generate and score the images of one model that are missing."""
        return GeneratedImages.fill(self.spec(root), generator, self.rewards, progress=True)


def run_benchmark(cfg: DictConfig, overrides: Sequence[str], folder: Path) -> dict | None:
    """Draw and score the configured benchmark in `folder`, or read `cfg.results`; return the figures.

    With `cfg.run`, the run's own configuration and policy are used, and `benchmarks/NAME` of its directory.
    All processes draw; the first one writes, and the others return None.
    Raises InputError for a list, a model or results that are missing or cannot be used.
    """
    command = " ".join(["python evaluate.py", *overrides])
    if cfg.run is not None:
        cfg = _of_run(cfg, overrides)
    use_base(cfg)
    benchmark = built(cfg, "benchmark.set")
    if not isinstance(benchmark, Benchmark):
        target = cfg.benchmark.set._target_
        raise InputError(
            f"benchmark.set._target_={target}: returns {type(benchmark).__name__}; it must return a "
            f"{Benchmark.__module__}.{Benchmark.__name__}"
        )
    if cfg.results is not None:
        named = plain(cfg)["results"]
        places = [Path(str(place)) for place in (named if isinstance(named, list) else [named])]
        return _read(benchmark, places, cfg.benchmark.seed, folder / OFFICIAL, command)
    if cfg.run is not None:
        folder = Path(str(cfg.run)) / BENCHMARKS / benchmark.name
    if (folder / POOLS).resolve() == Path(cfg.pool.root).resolve():
        raise InputError(
            f"pool.root={cfg.pool.root}: the images of the policy go there; give another root, or another "
            "hydra.run.dir"
        )
    rewards = benchmark_rewards(cfg)
    for reward in rewards:
        benchmark.parts_of(reward.name)  # refused before anything is drawn
    check_unconditional(cfg)
    check_reward_weights(rewards)
    check_accelerator(cfg.trainer.accelerator)
    check_engine(cfg)
    prepare_process(cfg.threads)
    return _draw(Drawing(cfg, benchmark, rewards, folder, overrides), command)


def _of_run(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Configuration of the finished run `cfg.run`, with its policy and what the command line asks."""
    folder = Path(str(cfg.run))
    own = run_config(folder, cfg, overrides)
    asked = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(asked, dict)
    for key in ("run", "base", "benchmark", "results", "trust"):
        OmegaConf.update(own, key, asked[key], merge=False, force_add=True)
    OmegaConf.update(own, "policy", str(folder / POLICY), force_add=True)
    return own


def _generators(cfg: DictConfig) -> Iterator[tuple[str, ImageGenerator]]:
    """Yield (row, generator) of the policy and of the base, as configured; weights are looked for first.

    A policy that is a pipeline of others (`is_whole`) is drawn with its own text encoders and VAE, another
    one with those of the base, and so is a negative model, which is drawn beside the base.
    """
    component = family_of(cfg)[0].denoiser_component
    policy, own = None, None
    if cfg.policy is not None:
        put_back(str(cfg.policy))
        policy = find_policy(str(cfg.policy), component)
        if is_whole(policy) and not is_negative(cfg):
            own = _with_weights(cfg, str(policy) if Path(str(cfg.policy)).exists() else str(cfg.policy))
            check_weights(own)
    with_base = cfg.benchmark.base or policy is None
    if with_base or own is None:
        check_weights(cfg)
    if own is not None:
        yield POLICY, ImageGenerator.base(base_of(own), sampler_settings(own), engine_of(own))
    if with_base or own is None:
        base = ImageGenerator.base(base_of(cfg), sampler_settings(cfg), engine_of(cfg))
        if policy is not None and own is None:
            run = None if cfg.run is None else Path(str(cfg.run))
            yield POLICY, tuned_generator(base, policy, engine_of(cfg, policy), is_negative(cfg), run)
        if with_base:
            yield BASE, base


def _with_weights(cfg: DictConfig, source: str) -> DictConfig:
    """Configuration whose model has the weights of a folder or of a hub id, `owner/name@revision`."""
    own = copy.deepcopy(cfg)
    weights, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    for key, value in {"weights": weights, "revision": revision or None, "variant": None}.items():
        if key == "weights" or key in own.model.backbone:
            own.model.backbone[key] = value
    return own


def _identity(cfg: DictConfig, benchmark: Benchmark, generator: ImageGenerator) -> dict[str, object]:
    """What the images of a row follow from, as JSON values."""
    prints, settings = generator.backbone.fingerprints, generator.settings
    return {
        "benchmark": benchmark.name,
        "set": benchmark.identity,
        "seed": cfg.benchmark.seed,
        "model": cfg.model.name,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "precision": settings.precision,
        "denoiser": generator.denoiser_fingerprint,
        "generator": generator.fingerprint,
        "text_encoders": prints["text_encoders"],
        "latent_space": prints["latent_space"],
    }


def benchmark_rewards(cfg: DictConfig) -> list[Reward]:
    """Rewards that score here: those of `benchmark.rewards`, or those at the key that it names."""
    place = benchmark_place(cfg)
    if place is None:
        return []
    if not OmegaConf.select(cfg, place):
        raise InputError(
            f"benchmark.rewards={place}: model={cfg.model.name} has none there; name scorers: "
            "rewards@benchmark.rewards=NAME"
        )
    return rewards_of(cfg, place)


def _draw(drawing: Drawing, command: str) -> dict | None:
    """Draw all rows, and write trees, seeds, README and tables; None in all processes but the first."""
    cfg, benchmark, folder = drawing.cfg, drawing.benchmark, drawing.folder
    rows, settings, size = [], {}, (0, 0)
    step = max(1, len(benchmark.drawn) // CARDS)
    cards = {place: {} for place in range(0, len(benchmark.drawn), step)[:CARDS]}
    for name, generator in _generators(cfg):
        settings[name] = _identity(cfg, benchmark, generator)
        if launch().first:
            claim(folder, name, settings[name])
        drawn = drawing.filled(generator, Path(cfg.pool.root) if name == BASE else folder / POOLS)
        if not launch().first:
            continue
        size = write_tree(benchmark, drawn, folder / IMAGES / name)
        scores = drawn.scores(drawing.rewards) if drawing.rewards else {}
        rows.append(Row.of_scores(name, benchmark, scores))
        for place, images in cards.items():
            images[name] = drawn.images(place)[:CARD_IMAGES]
    if not launch().first:
        return None
    write_seeds(benchmark, cfg.benchmark.seed, folder)
    asked = [given for given in drawing.overrides if given.startswith("benchmark")]
    write_whole(folder / README, readme(benchmark, folder, settings, size, asked))
    drawn = benchmark.drawn
    shown = [Shown(drawn[place].text, drawn[place].category, images) for place, images in cards.items()]
    return _tell(drawing.benchmark, rows, cfg.benchmark.seed, folder, command, settings, shown)


def _read(benchmark: Benchmark, places: Sequence[Path], seed: int, folder: Path, command: str) -> dict:
    """Read what the official scorer wrote for one or more models, and write their tables to `folder`."""
    names = [place.stem if place.suffix else place.name for place in places]
    if len(set(names)) < len(names):
        names = list(map(str, places))
    rows = [Row(name, benchmark.read_official(place)) for name, place in zip(names, places, strict=True)]
    return _tell(benchmark, rows, seed, folder, command, {})


def _tell(
    benchmark: Benchmark,
    rows: Sequence[Row],
    seed: int,
    folder: Path,
    command: str,
    settings: Mapping[str, Mapping[str, object]],
    shown: Sequence[Shown] = (),
) -> dict:
    """Write the figures of the rows and their tables to `folder`, and print them; return the figures."""
    found = summary(benchmark, rows, seed)
    table = BenchmarkTable(found, command, settings, benchmark.notes, shown)
    files = table.write(folder)
    write_json(folder / RESULTS, {**found, "settings": settings}, allow_nan=False)
    for printed in table.console():
        console.print(printed)
    if settings:
        told = f"images: {folder / IMAGES}; seeds and the official scorer's command: {folder / README}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    console.print(f"figures: {', '.join(map(str, files))}", markup=False, highlight=False, soft_wrap=True)
    return found

"""The engine that a configuration chooses, and how its workers build a stage from that configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo.backbones.parts import TEXT
from capo.cli.build import Components, base_of, is_negative, sampler_settings, tuned_generator
from capo.cli.named_rewards import all_rewards, benchmark_place, held_out_rewards, rewards_of
from capo.cli.process import prepare_process, thread_count
from capo.data.engines import Engine, LocalEngine
from capo.data.generation import ImageGenerator
from capo.data.importing.filling import EncodeOrder, ordered_stage
from capo.data.pool import Pool
from capo.data.scoring import ScoreStage
from capo.data.stages import LatentStage, Order, Stage, TextStage
from capo.errors import InputError
from capo.runtime.launch import launch
from capo.runtime.run_folder import WORKERS

LOCAL, RAY = "local", "ray"  # kinds of engine
# stage of a pool -> parts of the base that it computes with besides the VAE; None: all
PARTS = {TextStage.name: (TEXT,), LatentStage.name: None, ScoreStage.name: ()}


def engine_of(cfg: DictConfig, policy: Path | None = None) -> Engine:
    """Engine for images of the base, or of an exported policy; a stored configuration may name none."""
    own = cfg.get("engine")
    if own is None or own.kind == LOCAL:
        return LocalEngine()
    from capo.data.engines.on_ray import RayEngine
    from capo.data.engines.schedule import Room

    threads = thread_count(cfg.threads)
    return RayEngine(
        StageBuilder(OmegaConf.to_yaml(cfg, resolve=True), policy and str(policy.absolute()), threads),
        own.address,
        own.attempts,
        own.start_limit,
        threads,
        {stage: Room(float(own[stage].devices), own[stage].workers) for stage in PARTS},
    )


def check_engine(cfg: DictConfig) -> None:
    """Raise InputError for an engine that cannot start here: without its extra, or under a launcher."""
    if cfg.engine.kind != RAY:
        return
    from capo.data.engines.ray_cluster import require_package

    require_package()
    if launch().world_size > 1:
        raise InputError(
            f"engine=ray with {launch().world_size} processes of a launcher: Ray starts the workers itself; "
            "fill the pools first, by generate.py engine=ray alone, and train with engine=local"
        )


def engaged(cfg: DictConfig, components: Components) -> Components:
    """Let the configured engine fill the base's pools."""
    return replace(components, generator=replace(components.generator, engine=engine_of(cfg)))


@dataclass(frozen=True)
class StageBuilder:
    """Builds a stage of a pool in a worker, with no other parts of the pipeline than it computes with.

    Attributes:
        config: the resolved configuration, as YAML.
        policy: folder of the exported policy whose images are drawn; None: the base's.
        threads: torch threads of a worker.
    """

    config: str
    policy: str | None
    threads: int

    def __call__(self, order: Order) -> Stage:
        """Build the stage. Raises InputError if the pool there is not the one that the driver works on."""
        cfg = OmegaConf.create(self.config)
        assert isinstance(cfg, DictConfig)
        prepare_process(self.threads)
        pool = shared_pool(order)
        parts = () if isinstance(order, EncodeOrder) else PARTS[order.stage]
        settings, backbone = sampler_settings(cfg), base_of(cfg, parts)
        base = ImageGenerator.base(backbone, settings)
        common = (pool, (), backbone, settings, order.verify)
        if isinstance(order, EncodeOrder):
            stage = ordered_stage(order, pool, backbone, settings)
        elif order.stage == TextStage.name:
            stage = TextStage(*common)
        elif order.stage == ScoreStage.name:
            logs = Path(cfg.run_dir) / WORKERS
            trained, evaluated, oracle = all_rewards(cfg, logs)
            known = [*trained, *evaluated, *oracle, *held_out_rewards(cfg, trained, evaluated)]
            if place := benchmark_place(cfg):
                known += rewards_of(cfg, place, logs)
            by_key = {reward.key: reward for reward in known}
            stage = ScoreStage(*common, [by_key[key] for key in order.rewards], order.candidates)
        else:
            drawn = (
                tuned_generator(base, Path(self.policy), negative=is_negative(cfg)) if self.policy else base
            )
            check_same("generator", drawn.fingerprint, pool)
            guide = drawn.unconditional and drawn.unconditional.network
            stage = LatentStage(*common, order.candidates, drawn.denoiser, guide)
        for part in ("latent_space", "text_encoders"):
            check_same(part, backbone.fingerprints[part], pool)
        return stage


def shared_pool(order: Order) -> Pool:
    """Open the driver's pool; InputError if the folder here holds another one, or none."""
    try:
        pool = Pool.open(order.folder)
        found = pool.manifest.differences(order.manifest)
    except InputError as error:
        found = [str(error)]
    if found:
        raise InputError(
            f"{order.folder} is not the pool that this process was started for ({'; '.join(found)}): set "
            "pool.root to a folder that all machines share"
        )
    return pool


def check_same(part: str, fingerprint: str, pool: Pool) -> None:
    """Raise InputError if a part of the model, loaded here, is not that of the pool's manifest."""
    if fingerprint != (wanted := getattr(pool.manifest, part)):
        raise InputError(
            f"{part} of the model loaded here has the fingerprint {fingerprint[:8]}, the pool's is "
            f"{wanted[:8]}: give every machine the same weights, policy and versions of this package"
        )

"""Run `plan=true`: compute what a run takes and what this machine lacks for it, without loading anything.

The plan is printed as tables and written to `plan.json` in the run directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from capo.backbones.finding import find_pipeline
from capo.backbones.precision import DTYPES
from capo.backbones.sampling import BASE, is_guided
from capo.backbones.sampling import POLICY as ITSELF
from capo.cli.build import built, family_of, inversion_of, moving_reference, prompt_splits, sampler_settings
from capo.cli.engines import RAY
from capo.cli.missing import find_missing, likely_pools
from capo.cli.rates import ORACLE, REWARD_PLACES, gpu_name, identity, judges_of, known_rewards, rates_of
from capo.cli.values import plain
from capo.data.prompts import expected_sizes
from capo.data.rounds import refreshes, validations
from capo.errors import InputError
from capo.objectives import requirements
from capo.preflight.architecture import Blueprint, from_folder, published, published_names
from capo.preflight.devices import peak_of
from capo.preflight.plan import disk_space, make_plan
from capo.preflight.plan_tables import print_plan
from capo.preflight.requests import (
    EVALUATED,
    OF_ROUNDS,
    VALIDATED,
    Judge,
    PoolRequest,
    Request,
    RewardRequest,
    SamplingRequest,
    TrainingRequest,
)
from capo.preflight.shortages import (
    Shortage,
    certain_memory,
    disk_findings,
    folder_bytes,
    likely_memory,
    shared_memory,
)
from capo.preflight.tracing import adapter_of
from capo.rewards import Reward
from capo.runtime.files import write_json
from capo.runtime.fingerprints import content_fingerprint
from capo.runtime.launch import device_count, divide, launch
from capo.runtime.outlook import EVALUATION, VALIDATION
from capo.runtime.run_folder import CHECKPOINTS, ONLINE, PLAN, POLICY

# stage of a pool -> phase of a plan
PHASES = {"text": "text", "latents": "pool", "scores": "pool scoring"}


def blueprint_of(cfg: DictConfig) -> Blueprint:
    """Blueprint of the model, from the configs in the weights' folder or else the published ones.

    Raises InputError if there are neither.
    """
    family, options = family_of(cfg)
    name = cfg.model.get("published") or cfg.model.name
    folder = Path(str(options.get("weights"))).expanduser()
    if not folder.is_dir() and name in published_names():
        return published(name, family, **options)
    unused = family.unused_parts(**options)
    try:
        there = find_pipeline(str(folder), options.get("revision"), options.get("variant"), unused)
    except InputError:
        there = None
    return from_folder(there, family, **options) if there else published(name, family, **options)


def training_request(cfg: DictConfig) -> TrainingRequest:
    """Training request for as many devices as the launcher started or the configuration names."""
    trainer, needs = cfg.trainer, requirements(built(cfg, "objective"))
    devices = max(launch().world_size, (device_count(trainer.devices) or 1) * trainer.num_nodes)
    lora = plain(cfg.model.lora) if cfg.model.lora else None
    if lora:
        lora |= {"targets": family_of(cfg)[0].lora_targets}
    return TrainingRequest(
        divide(trainer.batch, devices, trainer.micro_batch),
        trainer.max_steps,
        (cfg.selection.group if needs.loser else 1) * cfg.noise.times_per_pair,
        needs.reference,
        trainer.precision,
        trainer.optimizer,
        trainer.strategy,
        trainer.gradient_checkpointing,
        adapter_of(lora),
        trainer.accelerator != "cpu",
        trainer.precision if cfg.sampling.precision == trainer.precision else "32-true",
        max(launch().local_world_size, device_count(trainer.devices) or 1),
        inversion.passes if (inversion := inversion_of(cfg)) else 0,
        moving_reference(cfg) is not None,
        cfg.trainer.ema is not None,
    )


def prompt_counts(cfg: DictConfig) -> tuple[dict[str, int | None], list[Shortage]]:
    """Number of prompts by split, and shortages that keep prompt sets from being read on this machine.

    Sets on the hub are not downloaded; their limits and published sizes are used instead.
    """
    settings = plain(cfg.prompts)
    expected = expected_sizes(settings)
    given = [value for value in settings.values() if isinstance(value, dict)]
    if any(value.get("hub") and not value.get("path") for value in given) and not OmegaConf.missing_keys(
        cfg.prompts
    ):
        return expected, []
    try:
        return {split: len(prompts) for split, prompts in prompt_splits(cfg).items()}, []
    except InputError as error:
        return expected, [Shortage("prompts", str(error))]


def pool_requests(cfg: DictConfig, counts: dict[str, int | None]) -> dict[str, PoolRequest]:
    """Pools of the base, and the policy's images, which each validation generates anew and does not store."""
    evaluation, test = cfg.evaluation, counts["test"]
    zero = None if test is None else min(test, evaluation.zero_prompts)
    steps, rounds = cfg.trainer.max_steps, cfg.online.every
    validated_at = validations(0, steps, cfg.validation.every, rounds) + len(cfg.validation.strengths or ())
    trained, evaluated, watching, oracle = (
        judges_of(known_rewards(cfg, place)) for place in (*REWARD_PLACES, ORACLE)
    )
    watched, measured = trained + watching, evaluated + oracle

    def validated(judged: int, **options: Any) -> PoolRequest:
        images = cfg.validation.images
        return PoolRequest(counts["validation"], images, judged, judges=watched, **options)

    def tested(prompts: int | None, judges: tuple[Judge, ...], **options: Any) -> PoolRequest:
        times = int(cfg.evaluate)
        stored = len(measured) if options.get("stored", True) else 0
        return PoolRequest(
            prompts, evaluation.images, stored, times, judges=judges, stage=EVALUATION, **options
        )

    drawn = PoolRequest(counts["train"], cfg.pool.candidates, len(trained), judges=trained)
    again = refreshes(rounds, steps)
    later = replace(
        drawn,
        prompts=cfg.online.prompts or drawn.prompts,
        times=again,
        in_run=again if cfg.online.keep else 1,
    )
    return {
        **({} if cfg.pool.imported else {"train": drawn}),
        **({OF_ROUNDS: later} if again else {}),
        "validation": validated(len(watched)),
        "test": tested(test, measured),
        "zero": tested(zero, evaluated),
        VALIDATED: validated(0, times=validated_at, stored=False, stage=VALIDATION, encoded=False),
        EVALUATED: tested(test, measured, stored=False),
    }


def reward_request(cfg: DictConfig) -> RewardRequest:
    """Memory of the rewards' weights; rewards whose size is unknown are listed by name and not counted."""
    trained, evaluated, watching = (known_rewards(cfg, place) for place in REWARD_PLACES)
    each, validating = _distinct([*trained, *evaluated, *watching]), [*trained, *watching]

    def total(rewards: Sequence[Reward]) -> float:
        return sum(reward.held or 0 for reward in rewards)

    return RewardRequest(
        max(total(validating), total(evaluated)),
        max((reward.held or 0 for reward in validating), default=0),
        total(evaluated),
        total(each),
        [reward.name for reward in each if reward.held is None],
    )


def _distinct(rewards: Sequence[Reward]) -> list[Reward]:
    """Remove duplicates by what is computed."""
    found: dict[str, Reward] = {}
    for reward in rewards:
        found.setdefault(content_fingerprint(identity(reward)), reward)
    return list(found.values())


def float32_rewards(cfg: DictConfig) -> list[str]:
    """Keys of the scorers' precisions that are set to float32."""
    return [
        f"{place}.{reward.name}.scorer.precision"
        for place in REWARD_PLACES
        for reward in known_rewards(cfg, place)
        if isinstance(reward.scorer, Mapping) and reward.scorer.get("precision") == "float32"
    ]


def request_of(cfg: DictConfig, counts: dict[str, int | None]) -> Request:
    """Build the request from which the plan of `cfg` is made; InputError for a model without configs."""
    blueprint, sampling = blueprint_of(cfg), cfg.sampling
    drawing = SamplingRequest(
        sampling.steps,
        2 if is_guided(sampling.guidance) else 1,
        sampling.batch,
        sampling.precision,
        sampling.decode or sampling.batch,
        sampling.unconditional != ITSELF or cfg.selection.swap,
        sampling.unconditional not in (ITSELF, BASE),
        sampler_settings(cfg).drawing.plain_blocks,
    )
    itemsize = DTYPES[cfg.model.backbone.get("dtype", "float32")].itemsize
    training, peak = training_request(cfg), peak_of(cfg.planning.flops, gpu_name(cfg.trainer.accelerator))
    return Request(
        blueprint,
        training,
        drawing,
        pool_requests(cfg, counts),
        itemsize,
        peak.flops,
        cfg.planning.utilization,
        reward_request(cfg),
        cfg.evaluate,
        cfg.export,
        DTYPES[cfg.export_dtype].itemsize,
        rates_of(cfg, blueprint, training),
        peak.of,
    )


def room_findings(cfg: DictConfig, request: Request) -> list[Shortage]:
    """Shortages of disk and memory that are certain.

    The disk must hold what is still to be written; the device must hold the model states, whatever the batch.
    """
    root, run, space = Path(cfg.pool.root), Path(cfg.run_dir), disk_space(request)
    pools = 0
    for name, folders in likely_pools(cfg).items():
        need = space["pools"].get(name) or 0
        pools += max(0, need - folder_bytes(*folders))
    written = folder_bytes(run / CHECKPOINTS, run / POLICY, run / ONLINE)
    own = sum(need or 0 for name, need in space["run"].items() if name != "total")
    found = disk_findings({root: pools, run: max(0, own - written)})
    return found + certain_memory(request.model_states(request.training.shards), cfg.trainer.accelerator)


def require_room(cfg: DictConfig) -> None:
    """Raise InputError if disk or memory is certainly too small; reads sizes only, before weights load."""
    if cfg.model.backbone.get("weights") is None:
        return
    try:
        blueprint_of(cfg)
    except InputError:  # a user's own model, whose size is unknown before it is loaded
        return
    counts, _ = prompt_counts(cfg)
    if found := room_findings(cfg, request_of(cfg, counts)):
        raise InputError("\n".join(finding.message for finding in found))


def shared_rooms(cfg: DictConfig) -> dict[str, tuple[str, float, int | None]]:
    """Stage of engine=ray -> phase of a plan, devices of a worker, the most workers; none of engine=local."""
    if cfg.engine.kind != RAY:
        return {}
    rooms = {stage: cfg.engine[stage] for stage in PHASES}
    return {stage: (PHASES[stage], float(room.devices), room.workers) for stage, room in rooms.items()}


def run_plan(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Make the plan, print it, and write it to `plan.json` in the run directory; return its content.

    The directory is not marked as a run; training can start there later. Raises InputError for values that
    cannot be used.
    """
    counts, missing = prompt_counts(cfg)
    request = request_of(cfg, counts)
    plan = {"model": cfg.model.name, **make_plan(request), "prompts": counts}
    too_large = likely_memory(plan["device"], plan["host"], cfg.trainer.accelerator, float32_rewards(cfg))
    too_large += shared_memory(plan["device"], shared_rooms(cfg), cfg.trainer.accelerator)
    missing = [*find_missing(cfg), *missing, *room_findings(cfg, request), *too_large]
    seen = dict.fromkeys((finding.kind, finding.message, finding.certain) for finding in missing)
    plan["missing here"] = [
        {"kind": kind, "message": message, "certain": certain} for kind, message, certain in seen
    ]
    plan["config"] = plain(cfg)
    path = Path(cfg.run_dir) / PLAN
    write_json(path, plan, allow_nan=False)
    print_plan(plan, console)  # last: whoever reads it may stop
    console.print(f"plan: {path}")
    return plan

"""`plan=true`: from a configuration to a plan, to what is missing here, to `plan.json` and a table; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from capo.backbones.loading import find_pipeline
from capo.backbones.precision import DTYPES
from capo.cli.build import all_rewards, built, held_out_rewards, prompt_splits
from capo.cli.readiness import check_accelerator, check_draw, check_reward_weights, check_weights
from capo.cli.values import check_values
from capo.errors import InputError
from capo.objectives import requirements
from capo.preflight.architecture import Blueprint, from_folder, published, published_names
from capo.preflight.plan import (
    PoolRequest,
    Request,
    RewardRequest,
    SamplingRequest,
    TrainingRequest,
    disk_space,
    make_plan,
)
from capo.preflight.plan_tables import print_plan
from capo.preflight.shortages import Shortage, certain_memory, disk_findings, folder_bytes, likely_memory
from capo.preflight.tracing import adapter_of
from capo.rewards import Reward, load_rewards
from capo.runtime.files import write_whole
from capo.runtime.launch import device_count, divide, launch
from capo.runtime.optimizers import check_optimizer

PLAN = "plan.json"
SPLITS = ("train", "validation", "test")
REWARD_PLACES = ("rewards", "evaluation.rewards", "validation.held_out")


def blueprint_of(cfg: DictConfig) -> Blueprint:
    """From the configs of the weights' folder where there is one, else from the published ones. Raises InputError where neither is."""
    backbone = cfg.model.backbone
    family, options = get_class(backbone._target_), OmegaConf.to_container(backbone, resolve=True)
    left_out = family.unused_parts(**options) if hasattr(family, "unused_parts") else {}
    length = int(options.get("sequence_length", 256))
    name = cfg.model.get("published") or cfg.model.name
    folder = Path(str(options.get("weights"))).expanduser()
    if not folder.is_dir() and name in published_names():
        return published(name, tuple(left_out), length)
    try:
        there = find_pipeline(str(folder), options.get("revision"), options.get("variant"), left_out)
    except InputError:
        there = None
    return from_folder(there, tuple(left_out), length) if there else published(name, tuple(left_out), length)


def training_request(cfg: DictConfig, blueprint: Blueprint) -> TrainingRequest:
    """The run's training, with as many devices as the launcher has started or the configuration names."""
    trainer, needs = cfg.trainer, requirements(built(cfg.objective))
    devices = max(launch().world_size, (device_count(trainer.devices) or 1) * trainer.num_nodes)
    lora = OmegaConf.to_container(cfg.model.lora, resolve=True) if cfg.model.lora else None
    if lora:
        lora |= {"targets": get_class(cfg.model.backbone._target_).lora_targets}
    return TrainingRequest(
        divide(trainer.batch, devices, trainer.micro_batch),
        trainer.max_steps,
        2 if needs.loser else 1,
        needs.reference,
        trainer.precision,
        trainer.optimizer,
        trainer.strategy,
        trainer.gradient_checkpointing,
        adapter_of(lora),
        trainer.accelerator != "cpu",
        trainer.precision if cfg.sampling.precision == trainer.precision else "32-true",
    )


def prompt_counts(cfg: DictConfig) -> tuple[dict[str, int | None], list[Shortage]]:
    """Prompts by split, and what keeps them from being read here. Sets of the hub are not fetched: limits and published sizes count."""
    settings = OmegaConf.to_container(cfg.prompts, resolve=True)
    expected = expected_counts(settings)
    given = [value for value in settings.values() if isinstance(value, dict)]
    if any(value.get("hub") and not value.get("path") for value in given) and not OmegaConf.missing_keys(
        cfg.prompts
    ):
        return expected, []
    try:
        return {split: len(prompts) for split, prompts in prompt_splits(cfg).items()}, []
    except InputError as error:
        return expected, [Shortage("prompts", str(error))]


def expected_counts(settings: Mapping) -> dict[str, int | None]:
    """Prompts by split as far as `settings` of the prompts tell, nothing read: the limit, or what is there of a published set.

    Splits of the same set share it in the order of `priority`.
    """
    counts: dict[str, int | None] = dict.fromkeys(SPLITS)
    taken: dict[str, int] = {}
    for split in settings.get("priority") or SPLITS:
        given = settings.get(split)
        if not isinstance(given, Mapping):
            counts[split] = given if isinstance(given, int) else None
            continue
        place, size = (
            str([given.get(key) for key in ("path", "hub", "file", "revision")]),
            given.get("published_size"),
        )
        known = [given.get("limit"), None if size is None else max(0, size - taken.get(place, 0))]
        counts[split] = min((count for count in known if isinstance(count, int)), default=None)
        taken[place] = taken.get(place, 0) + (counts[split] or 0)
    return counts


def pool_requests(cfg: DictConfig, counts: dict[str, int | None]) -> dict[str, PoolRequest]:
    """The base's pools, and the policy's images, which validation draws again and again and keeps nowhere."""
    evaluation, trained, evaluated = (
        cfg.evaluation,
        len(cfg.rewards),
        len(cfg.evaluation.rewards) + len(cfg.evaluation.oracle or {}),
    )
    test = counts["test"]
    zero = None if test is None else min(test, evaluation.zero_prompts)
    steps, every = cfg.trainer.max_steps, cfg.validation.every
    validations = -(-steps // every)
    return {
        **(
            {} if cfg.pool.imported else {"train": PoolRequest(counts["train"], cfg.pool.candidates, trained)}
        ),
        "validation": PoolRequest(
            counts["validation"], cfg.validation.images, trained + len(cfg.validation.held_out or {})
        ),
        "test": PoolRequest(test, evaluation.images, evaluated),
        "zero": PoolRequest(zero, evaluation.images, evaluated),
        "policy in validation": PoolRequest(
            counts["validation"], cfg.validation.images, 0, validations, stored=False
        ),
        "policy in evaluation": PoolRequest(test, evaluation.images, 0, int(cfg.evaluate), stored=False),
    }


def reward_request(cfg: DictConfig) -> RewardRequest:
    """What the rewards hold, those left out that this machine cannot name (`find_missing` says so)."""
    trained, evaluated, watching = (_known_rewards(cfg, place) for place in REWARD_PLACES)
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


def _known_rewards(cfg: DictConfig, place: str) -> list[Reward]:
    entries = OmegaConf.to_container(OmegaConf.select(cfg, place) or OmegaConf.create(), resolve=True)
    return [
        _known_reward(name, entry, place) for name, entry in sorted(entries.items()) if entry.get("scorer")
    ]


def _known_reward(name: str, entry: dict, place: str) -> Reward:
    try:
        return Reward(name, **entry)
    except TypeError:
        load_rewards({name: entry}, place)  # which names the key that it does not know
        raise


def _distinct(rewards: Sequence[Reward]) -> list[Reward]:
    """Each reward once. By what its fingerprint is made of, not by that: it would read the weights."""
    found: dict[str, Reward] = {}
    for reward in rewards:
        found.setdefault(
            json.dumps([reward.name, reward.scorer, reward.weights, reward.revision], sort_keys=True), reward
        )
    return list(found.values())


def float32_rewards(cfg: DictConfig) -> list[str]:
    """Key of the precision of each reward whose scorer has such a key, at float32."""
    return [
        f"{place}.{reward.name}.scorer.precision"
        for place in REWARD_PLACES
        for reward in _known_rewards(cfg, place)
        if isinstance(reward.scorer, Mapping) and reward.scorer.get("precision") == "float32"
    ]


def request_of(cfg: DictConfig, counts: dict[str, int | None]) -> Request:
    """Everything that the plan of `cfg` follows from. Raises InputError for a model without configs."""
    blueprint, sampling = blueprint_of(cfg), cfg.sampling
    drawing = SamplingRequest(
        sampling.steps,
        2 if sampling.guidance > 1 else 1,
        sampling.batch,
        sampling.precision,
        sampling.decode or sampling.batch,
    )
    itemsize = DTYPES[cfg.model.backbone.get("dtype", "float32")].itemsize
    return Request(
        blueprint,
        training_request(cfg, blueprint),
        drawing,
        pool_requests(cfg, counts),
        itemsize,
        cfg.planning.flops,
        cfg.planning.utilization,
        reward_request(cfg),
        cfg.evaluate,
    )


def room_findings(cfg: DictConfig, request: Request) -> list[Shortage]:
    """What is certain of disk and memory: what is still to be written, and what the device holds whatever the batch."""
    root, run, space = Path(cfg.pool.root), Path(cfg.run_dir), disk_space(request)
    seeds = {
        "train": (cfg.pool.seed, "train"),
        "validation": (cfg.evaluation.seed, "validation"),
        "test": (cfg.evaluation.seed, "test"),
        "zero": (cfg.evaluation.seed + 1, "test"),
    }
    pools = 0
    for name, (seed, split) in seeds.items():
        need = space["pools"].get(name) or 0
        pools += max(0, need - folder_bytes(*root.glob(f"{cfg.model.name}-*-{seed}-{split}")))
    written = folder_bytes(run / "checkpoints", run / "policy")
    found = disk_findings({root: pools, run: max(0, space["run"]["total"] - written)})
    return found + certain_memory(request.model_states(request.training.shards), cfg.trainer.accelerator)


def require_room(cfg: DictConfig) -> None:
    """InputError where disk or memory are certain not to do; reads sizes only, before weights are loaded."""
    if cfg.model.backbone.get("weights") is None:
        return
    try:
        blueprint_of(cfg)
    except InputError:  # a model of the user's own, of which nothing is known beforehand
        return
    counts, _ = prompt_counts(cfg)
    if found := room_findings(cfg, request_of(cfg, counts)):
        raise InputError("\n".join(finding.message for finding in found))


def _attempt(kind: str, check: Callable[[], object]) -> list[Shortage]:
    try:
        check()
    except InputError as error:
        return [Shortage(kind, str(error))]
    return []


def _reward_findings(cfg: DictConfig, place: str) -> list[Shortage]:
    """What each reward at a key lacks, by itself."""
    entries = OmegaConf.to_container(OmegaConf.select(cfg, place) or OmegaConf.create(), resolve=True)

    def check(name: str) -> None:
        check_reward_weights(load_rewards({name: entries[name]}, place))

    return [finding for name in sorted(entries) for finding in _attempt("rewards", partial(check, name))]


def find_missing(cfg: DictConfig) -> list[Shortage]:
    """What `check_ready` would end with, all of it rather than the first: weights, rewards, extras, the device."""
    return [
        *_attempt("weights", lambda: check_weights(cfg)),
        *(finding for place in REWARD_PLACES for finding in _reward_findings(cfg, place)),
        *_attempt("rewards", lambda: held_out_rewards(cfg, all_rewards(cfg)[0], [])),
        *_attempt("extras", lambda: check_optimizer(cfg.trainer.optimizer)),
        *_attempt("configuration", lambda: check_draw(cfg)),
        *_attempt("device", lambda: check_accelerator(cfg)),
    ]


def run_plan(cfg: DictConfig, console: Console) -> dict[str, object]:
    """Make the plan, print it, write it to the run directory, which stays no run's. Raises InputError for values that cannot be used."""
    check_values(cfg)
    counts, missing = prompt_counts(cfg)
    request = request_of(cfg, counts)
    plan = {"model": cfg.model.name, **make_plan(request), "prompts": counts}
    too_large = likely_memory(plan["device"], plan["host"], cfg.trainer.accelerator, float32_rewards(cfg))
    missing = [*find_missing(cfg), *missing, *room_findings(cfg, request), *too_large]
    seen = dict.fromkeys((finding.kind, finding.message, finding.certain) for finding in missing)
    plan["missing here"] = [
        {"kind": kind, "message": message, "certain": certain} for kind, message, certain in seen
    ]
    plan["config"] = OmegaConf.to_container(cfg, resolve=True)
    print_plan(plan, console)
    path = Path(cfg.run_dir) / PLAN
    write_whole(path, json.dumps(plan, indent=2, allow_nan=False) + "\n")
    console.print(f"plan: {path}")
    return plan

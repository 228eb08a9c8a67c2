"""Rates of a configuration's work: what they depend on, measuring them here, and reading them for a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL.Image import Image
from rich.console import Console
from rich.table import Table

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings, encode_unconditional, sample_prompts
from capo.cli.process import thread_count, worker_logs
from capo.cli.values import plain
from capo.data.stages import TEXT_BATCH
from capo.errors import InputError, closest, first_line
from capo.preflight.architecture import Blueprint
from capo.preflight.devices import cpu_name
from capo.preflight.rates import FOLDER, Measurement, measured_rate, read_rate, write_rate
from capo.preflight.requests import Judge, Rates, Request, TrainingRequest
from capo.rewards import Reward, load_rewards
from capo.runtime.fingerprints import content_fingerprint
from capo.runtime.hub import cached_snapshot, is_hub_id
from capo.runtime.launch import launch
from capo.runtime.outlook import DECODING, LATENTS, TEXT, TRAINING
from capo.runtime.threads import BATCHES

REWARD_PLACES = ("rewards", "evaluation.rewards", "validation.held_out")
ORACLE = "evaluation.oracle"
STEPS = 4  # denoising steps of a measurement
SCORING = "scoring"  # the kind of a reward's rate
UNITS = {TEXT: "prompts", LATENTS: "denoising steps of one image", DECODING: "images", TRAINING: "pairs"}
MEASURED, STATED = "measured here", "stated (planning.scoring)"
# keys of `sampling` that do not change the time of a denoising step, or have a rate of their own
APART = ("steps", "guidance", "decode", "unconditional")
# fields of a training request on which the rate of one device does not depend, but for the micro-batch
SHARED = ("division", "steps", "strategy", "local_processes")


def known_rewards(cfg: DictConfig, place: str) -> list[Reward]:
    """Rewards at the key `place` that have a scorer, sorted by name; nothing of them is loaded or checked."""
    entries = plain(OmegaConf.select(cfg, place) or OmegaConf.create())
    return [
        _known_reward(name, entry, place) for name, entry in sorted(entries.items()) if entry.get("scorer")
    ]


def _known_reward(name: str, entry: dict, place: str) -> Reward:
    try:
        return Reward(name, **entry)
    except TypeError:
        load_rewards({name: entry}, place)  # raises an InputError that names the unknown key
        raise


def identity(reward: Reward) -> dict[str, Any]:
    """What a reward computes: the parts of its fingerprint, which itself reads the weights."""
    scorer = reward.scorer if isinstance(reward.scorer, Mapping) else str(reward.scorer)
    return {
        "name": reward.name,
        "scorer": scorer,
        "weights": reward.weights,
        "revision": reward.revision,
        "version": reward.version,
    }


def judges_of(rewards: Sequence[Reward]) -> tuple[Judge, ...]:
    """Judges of images, for a plan."""
    return tuple(Judge(reward.name, content_fingerprint(identity(reward))) for reward in rewards)


def gpu_name(accelerator: str) -> str | None:
    """Name of this process's GPU, or None if a run here has none."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(launch().local_rank)


def measurements(cfg: DictConfig, blueprint: Blueprint, training: TrainingRequest) -> dict[str, Measurement]:
    """What the rates of text, denoising steps, decoding and training depend on, by kind."""
    gpu = gpu_name(cfg.trainer.accelerator)
    sampling, trainer = plain(cfg.sampling), cfg.trainer
    base = {
        "architecture": content_fingerprint({"configs": blueprint.configs, "options": blueprint.options}),
        "dtype": cfg.model.backbone.get("dtype", "float32"),
        **({} if gpu else {"threads": thread_count(cfg.threads)}),
    }
    step = {key: value for key, value in sampling.items() if key not in APART}
    pairs = {key: value for key, value in asdict(training).items() if key not in SHARED}
    if not training.inverting:  # rates that were measured without the key still hold
        del pairs["inverting"]
    kinds = {
        TEXT: {},
        LATENTS: {"sampling": step, "guided": sampling["guidance"] > 1},
        DECODING: {"batch": sampling["decode"] or sampling["batch"]},
        TRAINING: {
            "training": pairs,
            "micro_batch": training.division.micro_batch,
            "compile": trainer.compile,
            "channels_last": trainer.channels_last,
        },
    }
    device = gpu or cpu_name()
    return {kind: Measurement(kind, device, base | settings) for kind, settings in kinds.items()}


def scoring_measurement(cfg: DictConfig, blueprint: Blueprint, reward: Reward) -> Measurement:
    """What a reward's rate depends on: the reward, where it runs, and the size and number of the images."""
    gpu = gpu_name(cfg.trainer.accelerator)
    settings = {
        "reward": identity(reward),
        "isolated": bool(reward.python or reward.isolated),
        "latents": list(blueprint.latent_shape),
        "batch": cfg.sampling.batch,
        **({} if gpu else {"threads": thread_count(cfg.threads)}),
    }
    return Measurement(SCORING, gpu or cpu_name(), settings)


def rates_of(cfg: DictConfig, blueprint: Blueprint, training: TrainingRequest) -> Rates:
    """Rates for a plan: measured here before, and those of rewards also as `planning.scoring` states them.

    With `planning.flops` a plan is of another device, and what was measured on this one is not used.
    """
    root, origins, faults = Path(cfg.pool.root), {}, []

    def measured(name: str, measurement: Measurement) -> float | None:
        if cfg.planning.flops is not None:
            return None
        rate, fault = read_rate(root, measurement)
        faults.extend([fault] if fault else [])
        if rate is not None:
            origins[name] = MEASURED
        return rate

    base = {kind: measured(kind, of) for kind, of in measurements(cfg, blueprint, training).items()}
    stated, seen = plain(cfg.planning).get("scoring") or {}, set()
    names: set[str] = set()
    scoring: dict[str, float] = {}
    for place in (*REWARD_PLACES, ORACLE):
        for reward, judge in zip(found := known_rewards(cfg, place), judges_of(found), strict=True):
            names.add(reward.name)
            if judge.key in seen:
                continue
            seen.add(judge.key)
            if reward.name in stated:
                scoring[judge.key], origins[reward.name] = float(stated[reward.name]), STATED
            elif rate := measured(reward.name, scoring_measurement(cfg, blueprint, reward)):
                scoring[judge.key] = rate
    if unknown := [name for name in stated if name not in names]:
        near = closest(unknown[0], sorted(names))
        raise InputError(
            f"planning.scoring.{unknown[0]}: no reward of this run is called so; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names)) or 'none'}")
        )
    return Rates(base[TEXT], base[LATENTS], base[DECODING], base[TRAINING], scoring, origins, faults)


def measure_base(
    cfg: DictConfig, backbone: Backbone, captions: Sequence[str]
) -> tuple[dict[str, float], list[Image]]:
    """Measure text encoding, denoising steps and decoding, in the batches of a pool.

    Returns:
        Units a second by kind, and `sampling.batch` decoded images, which rewards can be measured with.
    """
    device, settings = backbone.device, replace(SamplerSettings(**cfg.sampling), steps=STEPS)
    lanes = torch.get_num_threads() if settings.parallel == BATCHES and device.type == "cpu" else 1
    count = settings.batch * lanes
    prompts = [captions[number % len(captions)] for number in range(TEXT_BATCH)]
    text = backbone.encode_prompts(captions[:1])
    text = {name: value.expand(count, *value.shape[1:]) for name, value in text.items()}
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(settings.decoded, *backbone.latent_shape, generator=draw)

    def encode() -> int:
        backbone.encode_prompts(prompts)
        return len(prompts)

    def denoise() -> int:
        sample_prompts(backbone, backbone.denoiser, text, [[seed] for seed in range(count)], settings)
        return count * STEPS

    def decode() -> int:
        return len(backbone.decode(latents, settings.decoded))

    encode_unconditional(backbone, settings, [count])  # as before a pool is drawn
    work = {
        TEXT: (encode, backbone.text_encoders),
        LATENTS: (denoise, [backbone.denoiser]),
        DECODING: (decode, [backbone.vae]),
    }
    rates = {}
    for kind, (once, parts) in work.items():
        with backbone.placed(*parts):  # as for a whole stage: to move them is no part of its rate
            rates[kind] = measured_rate(once, device)
    return rates, backbone.decode(latents[:1]) * settings.batch


def measure_rewards(
    cfg: DictConfig, images: Sequence[Image], caption: str, device: torch.device
) -> dict[str, tuple[Reward, float | str]]:
    """Measure each reward whose weights are here on a batch of images.

    Returns:
        Key of the reward in the configuration -> the reward, and images a second or why it was not measured.
    """
    found: dict[str, tuple[Reward, float | str]] = {}
    seen = set()
    for place in (*REWARD_PLACES, ORACLE):
        for known in known_rewards(cfg, place):
            key = content_fingerprint(identity(known))
            if key not in seen:
                seen.add(key)
                rate = _scoring_rate(cfg, place, known, images, caption, device)
                found[f"{place}.{known.name}"] = known, rate
    return found


def _scoring_rate(
    cfg: DictConfig, place: str, known: Reward, images: Sequence[Image], caption: str, device: torch.device
) -> float | str:
    try:
        entry = plain(OmegaConf.select(cfg, place))[known.name]
        (reward,) = load_rewards({known.name: entry}, place, worker_logs())
        if not _is_here(reward):
            return "its weights are not here"
        reward.setup(device)
    except InputError as error:
        return first_line(error)
    try:
        return measured_rate(lambda: len(reward.score(images, [caption] * len(images))), device)
    except InputError as error:
        return first_line(error)
    finally:
        reward.offload()


def _is_here(reward: Reward) -> bool:
    """Whether all that the reward reads is a file or folder, or in the hub's cache."""
    sources = [*reward.sources.values()] or [(reward.weights, reward.revision)]
    return all(
        source is None
        or Path(source).expanduser().exists()
        or (is_hub_id(source) and cached_snapshot(source, revision) is not None)
        for source, revision in sources
    )


def keep_rates(
    cfg: DictConfig,
    request: Request,
    base: Mapping[str, float],
    rewards: Mapping[str, tuple[Reward, float | str]],
    console: Console,
) -> None:
    """Write measured rates under the pool root, and print them; InputError if they cannot be written."""
    root, kinds = Path(cfg.pool.root), measurements(cfg, request.blueprint, request.training)
    table = Table("rate", "", title=f"rates of {kinds[TEXT].device}", title_justify="left")
    for kind, rate in base.items():
        write_rate(root, kinds[kind], rate)
        table.add_row(kind, f"{rate:,.3g} {UNITS[kind]} a second")
    for key, (reward, rate) in rewards.items():
        if isinstance(rate, float):
            write_rate(root, scoring_measurement(cfg, request.blueprint, reward), rate)
        told = f"{rate:,.3g} images a second" if isinstance(rate, float) else f"not measured: {rate}"
        table.add_row(key, told)
    console.print(table)
    console.print(f"rates: {root / FOLDER}, where plan=true on such a device finds them", soft_wrap=True)

"""Plan a run before anything is loaded: memory by part, FLOPs, disk, steps and hours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from capo.preflight.hours import hours
from capo.preflight.memory import (
    CHECKPOINT_ITEM,
    CHECKPOINTS,
    autocast_copies,
    drawing_bytes,
    parameters,
    pipeline_bytes,
    pool_bytes,
)
from capo.preflight.requests import OF_ROUNDS, PoolRequest, Request
from capo.preflight.tracing import activation_bytes, decoder_forward, denoiser_forward

# parts of a phase that generates images, scores them, or does both
SAMPLING, DECODING, BOTH = "sampling", "decoding", "sampling and decoding"
REWARDS = "rewards"
UNCONDITIONAL = "unconditional network"
SCORED = "scoring by "


def make_plan(request: Request) -> dict[str, Any]:
    """Compute the plan as JSON values.

    Keys: `parameters`, `division`, `device`, `host`, `flops`, `disk`, `steps`, `hours`, `notes`.
    """
    trained = request.training
    total, adapted = parameters(request.blueprint, trained.lora)
    arithmetic = flops_of(request)
    return {
        "parameters": {"denoiser": total, "trained": adapted},
        "division": {**asdict(trained.division), "pairs": math.prod(asdict(trained.division).values())},
        "device": device_memory(request),
        "host": host_memory(request),
        "flops": arithmetic,
        "disk": disk_space(request),
        "steps": trained.steps,
        "hours": hours(request, arithmetic),
        "notes": notes(request),
    }


def _phases(phases: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Add the total to each phase's parts, and the largest total as `peak`."""
    told: dict[str, Any] = {name: {**parts, "total": sum(parts.values())} for name, parts in phases.items()}
    return {**told, "peak": max(sum(parts.values()) for parts in phases.values())}


def device_memory(request: Request) -> dict[str, Any]:
    """Compute the bytes of each part on one device, by phase.

    Phases run one after another, so the largest total is the memory that is needed. Text is encoded first,
    then images are generated and scored; each part of the base and the rewards are there only while they
    work. The VAE counts with what it decodes.
    """
    training, blueprint = request.training, request.blueprint
    kept = request.model_states(training.shards).parts
    activations = activation_bytes(
        blueprint,
        training.images,
        training.precision,
        training.gpu,
        training.lora,
        training.gradient_checkpointing,
        training.frozen_in,
    )
    pipeline = pipeline_bytes(blueprint, request.itemsize)
    vae, encoders = pipeline["vae"], sum(pipeline[name] for name in blueprint.encoder_names)
    sampling = request.sampling
    drawing = (
        sampling.batch
        * sampling.branches
        * denoiser_forward(blueprint, sampling.precision, training.gpu).working
    )
    decoding = vae + sampling.decode * decoder_forward(blueprint).working
    copies = autocast_copies(blueprint, training.lora, sampling.precision)  # of a policy in training
    base, rewards = (
        {"denoiser": drawing_bytes(blueprint, None, sampling.precision, request.itemsize)},
        request.rewards,
    )
    policy = {"policy": drawing_bytes(blueprint, training.lora, sampling.precision)}
    guide = unconditional_bytes(request)
    compared = {**(guide if sampling.foreign else base if sampling.other else {}), **policy}
    return _phases(
        {
            "text": {"text encoders": encoders},
            "pool": {**base, SAMPLING: drawing},
            "pool scoring": {REWARDS: rewards.pool, DECODING: decoding},
            "training": {**kept, "activations": activations},
            **({OF_ROUNDS: {**compared, SAMPLING: drawing}} if OF_ROUNDS in request.pools else {}),
            "validation": {**kept, **guide, BOTH: max(drawing + copies, decoding)},
            "validation scoring": {**kept, REWARDS: rewards.validation},
            **(
                {
                    "evaluation": {**compared, SAMPLING: drawing},
                    "evaluation scoring": {REWARDS: rewards.evaluation, DECODING: decoding},
                }
                if request.evaluate
                else {}
            ),
        }
    )


def unconditional_bytes(request: Request) -> dict[str, int]:
    """Bytes, by its name in a plan, of the network that makes the unconditional prediction in validation.

    Empty where that is the policy, or the base, if training holds it: as the reference, or under an adapter.
    """
    sampling, training = request.sampling, request.training
    held = not sampling.other or (not sampling.foreign and training.holds_base)
    if held or sampling.branches == 1:
        return {}
    return {UNCONDITIONAL: drawing_bytes(request.blueprint, None, sampling.precision)}


def host_memory(request: Request) -> dict[str, Any]:
    """Compute the bytes of each part in host memory, by phase.

    The pipeline, its denoiser as it draws, and the rewards stay there while they are off the device, those of
    each process on a machine.
    The first process collects a checkpoint there if it is sharded; else it writes one tensor after another.
    """
    whole, each, blueprint = request.model_states(), request.training.local_processes, request.blueprint
    parts = pipeline_bytes(blueprint, request.itemsize)
    parts[blueprint.denoiser_name] = drawing_bytes(
        blueprint, None, request.sampling.precision, request.itemsize
    )
    pipeline = each * sum(parts.values())
    rewards = each * request.rewards.everything
    guide = unconditional_bytes(request) if request.sampling.foreign else {}
    guides = {name: each * size for name, size in guide.items()}
    # one that follows the policy begins on the device
    own = request.shares_reference or request.training.moving
    return _phases(
        {
            "loading": {
                "pipeline": pipeline,
                "rewards": rewards,
                "policy": each * whole.weights,
                "reference": 0 if own else each * whole.reference,
                **guides,
            },
            "training": {
                "pipeline": pipeline,
                "rewards": rewards,
                **guides,
                **({"checkpoint in flight": request.checkpoint} if request.training.shards > 1 else {}),
            },
        }
    )


def flops_of(request: Request) -> dict[str, float]:
    """Count the FLOPs of a forward pass, a pair, a denoising step of an image, its decoding, and all of it.

    A multiplication and an addition count as two operations. `pair_model` counts the necessary ones: a
    forward pass of policy and reference, those of an inversion, and the policy's backward pass, where each
    product with weights costs two more products (with LoRA one, since frozen weights have no gradient) and
    each product of activations two more. `pair` adds the forward pass that gradient checkpointing repeats.
    """
    training, sampling = request.training, request.sampling
    once = denoiser_forward(request.blueprint, sampling.precision, training.gpu)
    forward, decode = once.flops, decoder_forward(request.blueprint).flops
    step = sampling.branches * forward
    backward = (1 if training.lora else 2) * once.weight_flops + 2 * once.attention_flops
    passes = (2 if training.reference else 1) + training.inverting
    model = training.kinds * (forward * passes + backward)
    return {
        "forward": forward,
        "pair_model": model,
        "pair": model + (training.kinds * forward if training.gradient_checkpointing else 0.0),
        "step": step,
        "decode": decode,
        "image": sampling.steps * step + decode,
    }


def disk_space(request: Request) -> dict[str, Any]:
    """Compute the bytes under the pool root, by split, and in the run directory; None: unknown."""
    blueprint = request.blueprint

    def size(pool: PoolRequest) -> int | None:
        return (
            None
            if pool.prompts is None
            else pool_bytes(blueprint, pool.prompts, pool.images, pool.rewards, request.text_item)
        )

    stored = {name: pool for name, pool in request.pools.items() if pool.stored}
    pools = {name: size(pool) for name, pool in stored.items() if not pool.in_run}
    run: dict[str, int | None] = {
        "checkpoints": CHECKPOINTS * request.checkpoint,
        "policy": _policy_bytes(request),
    }
    exact = replace(request, export="adapter", exported_item=4)  # in float32, an adapter not merged
    for name, pool in stored.items():
        if pool.in_run:
            each = size(pool)
            run[name] = None if each is None else pool.in_run * (each + _policy_bytes(exact))
    return {"pools": {**pools, "total": _sum(pools.values())}, "run": {**run, "total": _sum(run.values())}}


def _policy_bytes(request: Request) -> int:
    """Size of the exported policy: an adapter's weights twice or a pipeline's, and a single file's."""
    blueprint, file = request.blueprint, request.export == "single_file"
    if request.training.lora and request.export != "full":
        policy = 2 * request.model_states().gradients
    else:
        policy = sum(pipeline_bytes(blueprint, request.exported_item).values())
    return policy + (sum(pipeline_bytes(blueprint, CHECKPOINT_ITEM).values()) if file else 0)


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _unrated(request: Request) -> list[str]:
    """Name the work whose speed is neither counted nor known."""
    judges = {judge for pool in request.pools.values() for judge in pool.judges}
    unknown = sorted({judge.name for judge in judges if judge.key not in request.rates.scoring})
    return [*(["text encoding"] if request.rates.text is None else []), *(SCORED + name for name in unknown)]


def notes(request: Request) -> list[str]:
    """List what the figures leave out or assume."""
    told = [
        "hours leave out loading and reading",
        "memory leaves out what the device's libraries and its kernels take",
    ]
    if unrated := _unrated(request):
        told.append(
            f"hours leave out what no rate is known of, {', '.join(unrated)}: check=true measures it on a "
            "device where the weights are, and planning.scoring states images a second of rewards"
        )
    told += request.rates.faults
    unknown = [name for name, pool in request.pools.items() if pool.prompts is None]
    if unknown:
        told.append(
            f"number of prompts unknown until the sets are read or given a limit: {', '.join(unknown)}"
        )
    if request.rewards.unknown:
        told.append(f"memory of these rewards is unknown and left out: {', '.join(request.rewards.unknown)}")
    if request.training.gpu and request.training.precision != "32-true":
        told.append("activations follow a GPU's autocast; on a CPU they are somewhat smaller")
    return told

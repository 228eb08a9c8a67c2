"""Plan a run before anything is loaded: memory by part, FLOPs, disk, steps and hours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from capo.preflight.architecture import Blueprint
from capo.preflight.memory import (
    CHECKPOINTS,
    ModelStates,
    autocast_copies,
    checkpoint_bytes,
    model_states,
    parameters,
    pipeline_bytes,
    pool_bytes,
)
from capo.preflight.tracing import Adapter, activation_bytes, decoder_forward, denoiser_forward
from capo.runtime.launch import FSDP, Division

HOUR = 3600  # seconds
# parts of a phase that generates images, scores them, or does both
SAMPLING, DECODING, BOTH = "sampling", "decoding", "sampling and decoding"
REWARDS = "rewards"


@dataclass(frozen=True)
class TrainingRequest:
    """Settings of the training that a plan depends on.

    Attributes:
        division: how a step's pairs are divided over devices and forward passes.
        steps: number of optimizer steps.
        kinds: images of a pair that the objective uses: 2, or 1 for the winner alone.
        reference: whether the objective needs the reference's errors.
        precision: Lightning's name of the training precision.
        optimizer: name of the optimizer.
        strategy: `auto`, `ddp` or `fsdp`.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        lora: {rank, alpha, seed, targets} from `capo.preflight.tracing.adapter_of`, or None for all weights.
        gpu: whether autocast follows a GPU's rules; the plan assumes so unless the accelerator is the CPU.
        frozen_in: precision for which the weights that LoRA freezes are stored.
    """

    division: Division
    steps: int
    kinds: int
    reference: bool
    precision: str
    optimizer: str
    strategy: str
    gradient_checkpointing: bool
    lora: Adapter | None
    gpu: bool
    frozen_in: str = "32-true"

    @property
    def shards(self) -> int:
        """Number of devices over which policy, optimizer state and reference are sharded."""
        return self.division.devices if self.strategy == FSDP else 1

    @property
    def images(self) -> int:
        """Number of images in one forward pass of a device."""
        return self.kinds * self.division.micro_batch


@dataclass(frozen=True)
class SamplingRequest:
    """Settings of the sampler that a plan depends on.

    Attributes:
        steps: number of denoising steps.
        branches: forward passes per image and step: 2 with guidance, else 1.
        batch: images in one forward pass, before guidance doubles them.
        precision: Lightning's name of the denoiser's precision.
        decode: images that the VAE decodes at once.
    """

    steps: int
    branches: int
    batch: int
    precision: str
    decode: int


@dataclass(frozen=True)
class PoolRequest:
    """Images of one split; `prompts` is None if their number is unknown until the prompt set is read."""

    prompts: int | None
    images: int  # per prompt
    rewards: int
    times: int = 1  # how often the images are generated
    stored: bool = True


@dataclass(frozen=True)
class RewardRequest:
    """Sizes of the rewards' weights in bytes; a reward in another process counts like any other.

    Attributes:
        pool: the largest set of rewards that scores one of the base's pools together: the rewards used in
            training and the held-out ones, or those of the evaluation.
        validation: the largest single reward, since validation loads one at a time.
        evaluation: all rewards of the evaluation together.
        everything: all rewards, each counted once.
        unknown: names of rewards that declare no size and are left out.
    """

    pool: float = 0
    validation: float = 0
    evaluation: float = 0
    everything: float = 0
    unknown: Sequence[str] = ()


@dataclass(frozen=True)
class Request:
    """Inputs of a plan; sizes in bytes, and `flops` the peak FLOP/s of one device."""

    blueprint: Blueprint
    training: TrainingRequest
    sampling: SamplingRequest
    pools: Mapping[str, PoolRequest]
    itemsize: int  # bytes per element of the base's weights in memory, and of its encoders' outputs
    flops: float
    utilization: float
    rewards: RewardRequest = RewardRequest()
    evaluate: bool = True  # whether the policy is evaluated after training

    def model_states(self, shards: int = 1) -> ModelStates:
        """Compute the model states on each of `shards` devices."""
        training = self.training
        return model_states(
            self.blueprint,
            training.lora,
            training.precision,
            training.optimizer,
            training.reference,
            shards,
            training.frozen_in,
        )

    @property
    def checkpoint(self) -> int:
        """Size of one checkpoint in bytes."""
        training = self.training
        return checkpoint_bytes(self.blueprint, training.lora, training.optimizer)


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

    Phases run one after another, so the largest total is the memory that is needed. Images are generated
    first and scored afterwards; rewards are on the device during scoring only.
    """
    training, blueprint = request.training, request.blueprint
    kept = asdict(request.model_states(training.shards))
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
    others = sum(size for name, size in pipeline.items() if name != blueprint.denoiser_name)
    sampling = request.sampling
    drawing = (
        sampling.batch
        * sampling.branches
        * denoiser_forward(blueprint, sampling.precision, training.gpu).working
    )
    decoding = sampling.decode * decoder_forward(blueprint).working
    copies = autocast_copies(blueprint, training.lora, sampling.precision)  # of a policy; the base is frozen
    base, rewards = (
        {"denoiser": pipeline[blueprint.denoiser_name], "VAE and text encoders": others},
        request.rewards,
    )
    compared = base | {"policy": request.model_states().weights}
    return _phases(
        {
            "pool": {**base, SAMPLING: drawing},
            "pool scoring": {**base, REWARDS: rewards.pool, DECODING: decoding},
            "training": {**kept, "activations": activations},
            "validation": {**kept, "VAE and text encoders": others, BOTH: max(drawing + copies, decoding)},
            "validation scoring": {**kept, REWARDS: rewards.validation},
            **(
                {
                    "evaluation": {**compared, SAMPLING: drawing + copies},
                    "evaluation scoring": {**compared, REWARDS: rewards.evaluation, DECODING: decoding},
                }
                if request.evaluate
                else {}
            ),
        }
    )


def host_memory(request: Request) -> dict[str, Any]:
    """Compute the bytes of each part in host memory, by phase.

    The pipeline and the rewards stay there while they are off the device, and a checkpoint is collected
    there.
    """
    whole = request.model_states()
    pipeline = sum(pipeline_bytes(request.blueprint, request.itemsize).values())
    rewards = request.rewards.everything
    return _phases(
        {
            "loading": {
                "pipeline": pipeline,
                "rewards": rewards,
                "policy": whole.weights,
                "reference": whole.reference,
            },
            "training": {
                "pipeline": pipeline,
                "rewards": rewards,
                "checkpoint in flight": request.checkpoint,
            },
        }
    )


def flops_of(request: Request) -> dict[str, float]:
    """Count the FLOPs of a forward pass, of a pair, and of a generated and decoded image.

    A multiplication and an addition count as two operations. `pair_model` counts the necessary ones: a
    forward pass of policy and reference, and the policy's backward pass, where each product with weights
    costs two more products (with LoRA one, since frozen weights have no gradient) and each product of
    activations two more. `pair` adds the forward pass that gradient checkpointing repeats.
    """
    training, sampling = request.training, request.sampling
    once = denoiser_forward(request.blueprint, sampling.precision, training.gpu)
    forward = once.flops
    backward = (1 if training.lora else 2) * once.weight_flops + 2 * once.attention_flops
    model = training.kinds * (forward * (2 if training.reference else 1) + backward)
    return {
        "forward": forward,
        "pair_model": model,
        "pair": model + (training.kinds * forward if training.gradient_checkpointing else 0.0),
        "image": sampling.steps * sampling.branches * forward + decoder_forward(request.blueprint).flops,
    }


def disk_space(request: Request) -> dict[str, Any]:
    """Compute the bytes under the pool root, by split (None: unknown), and in the run directory."""
    blueprint, whole = request.blueprint, request.model_states()

    def size(pool: PoolRequest) -> int | None:
        return (
            None
            if pool.prompts is None
            else pool_bytes(blueprint, pool.prompts, pool.images, pool.rewards, request.itemsize)
        )

    pools = {name: size(pool) for name, pool in request.pools.items() if pool.stored}
    # A fully tuned policy is exported as a whole pipeline in float32, an adapter as its own weights.
    policy = whole.gradients if request.training.lora else sum(pipeline_bytes(blueprint, 4).values())
    run = {"checkpoints": CHECKPOINTS * request.checkpoint, "policy": policy}
    return {"pools": {**pools, "total": _sum(pools.values())}, "run": {**run, "total": sum(run.values())}}


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def hours(request: Request, arithmetic: Mapping[str, float]) -> dict[str, float | None]:
    """Estimate the hours of training and of generating all images, at `utilization` of all devices' peak.

    Rewards, text encoders, loading and reading are left out. Unknown numbers are None.
    """
    training, division = request.training, request.training.division
    rate = request.flops * request.utilization * division.devices * HOUR
    pairs = math.prod(asdict(division).values())
    images = _sum(
        None if pool.prompts is None else pool.prompts * pool.images * pool.times
        for pool in request.pools.values()
    )
    return {
        "training": training.steps * pairs * arithmetic["pair"] / rate,
        "sampling": None if images is None else images * arithmetic["image"] / rate,
        "images": images,
        "flops": request.flops,
        "utilization": request.utilization,
    }


def notes(request: Request) -> list[str]:
    """List what the figures leave out or assume."""
    told = [
        "hours leave out rewards, text encoders, loading and reading",
        "memory leaves out what the device's libraries and its kernels take",
    ]
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

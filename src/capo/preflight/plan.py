"""What a run will take, before any of it is loaded: memory by part, arithmetic, disk, steps and hours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

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
SAMPLING, DECODING, BOTH = (
    "sampling",
    "decoding",
    "sampling and decoding",
)  # parts of a phase that draws, scores, or does both
REWARDS = "rewards"


@dataclass(frozen=True)
class TrainingRequest:
    """How a run trains.

    Attributes:
        division: of an optimizer step's pairs over devices and forward passes.
        steps: of the optimizer.
        kinds: images of a pair that the objective looks at: 2, or the winner alone.
        reference: whether the objective needs the base's errors.
        lora: {rank, alpha, seed, targets} as `capo.preflight.tracing.adapter_of` has them, or None for all weights.
        frozen_in: the precision for which what LoRA leaves frozen is stored.
        gpu: whether autocast follows a GPU's rules (which the plan assumes unless the accelerator is the CPU).
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
        """Into how many parts policy, optimizer and reference are split."""
        return self.division.devices if self.strategy == FSDP else 1

    @property
    def images(self) -> int:
        """Of one forward pass."""
        return self.kinds * self.division.micro_batch


@dataclass(frozen=True)
class SamplingRequest:
    """How images are drawn: `batch` at a time, `branches` forward passes of each (2 with guidance) in each of `steps`.

    `decode` of them go through the VAE at once.
    """

    steps: int
    branches: int
    batch: int
    precision: str
    decode: int


@dataclass(frozen=True)
class PoolRequest:
    """Images of one split; `prompts` is None where their number is not known before the set is read."""

    prompts: int | None
    images: int  # a prompt
    rewards: int
    times: int = 1  # how often they are drawn
    stored: bool = True


@dataclass(frozen=True)
class RewardRequest:
    """Bytes of the rewards' weights, on a device and off it.

    Rewards of `unknown` are left out: nobody has said what they hold. One in a process of its own counts like any other.

    Attributes:
        pool: of the most that score one of the base's pools together: the trained and the held-out ones, or the evaluated ones.
        validation: of the largest one; they come one after the other.
        evaluation: of those that are evaluated, together.
        everything: of all of them, each once.
    """

    pool: float = 0
    validation: float = 0
    evaluation: float = 0
    everything: float = 0
    unknown: Sequence[str] = ()


@dataclass(frozen=True)
class Request:
    """Everything that a plan follows from; sizes in bytes, `flops` those of one device at its peak in a second."""

    blueprint: Blueprint
    training: TrainingRequest
    sampling: SamplingRequest
    pools: Mapping[str, PoolRequest]
    itemsize: int  # of the base's weights in memory, and of what its encoders give
    flops: float
    utilization: float
    rewards: RewardRequest = RewardRequest()
    evaluate: bool = True  # the policy, in the end

    def model_states(self, shards: int = 1) -> ModelStates:
        """What the run keeps on each of so many devices."""
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
        """Of one."""
        training = self.training
        return checkpoint_bytes(self.blueprint, training.lora, training.optimizer)


def make_plan(request: Request) -> dict[str, object]:
    """The plan as JSON values: `parameters`, `division`, `device`, `host`, `flops`, `disk`, `steps`, `hours`, `notes`."""
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


def _phases(phases: Mapping[str, Mapping[str, int]]) -> dict[str, object]:
    """Parts and total of each phase, and the largest total as `peak`."""
    told: dict[str, object] = {
        name: {**parts, "total": sum(parts.values())} for name, parts in phases.items()
    }
    return {**told, "peak": max(sum(parts.values()) for parts in phases.values())}


def device_memory(request: Request) -> dict[str, object]:
    """Bytes of each part on one device, by phase; the phases follow one another, so the largest is what is needed.

    Images are drawn first and scored afterwards, and rewards are on the device for the second alone.
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


def host_memory(request: Request) -> dict[str, object]:
    """Bytes of each part beside the device: the pipeline waits there while others are on it, and a checkpoint is collected."""
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
    """Floating-point operations of a pair, and of an image that is drawn and decoded; a product and a sum are two.

    `pair_model` is what has to be computed: a forward pass of policy and reference, and the policy's backward pass, in which a
    product with weights costs two more (with LoRA one: frozen weights have no gradient), one of activations two more. `pair`
    adds the forward pass that gradient checkpointing repeats.
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


def disk_space(request: Request) -> dict[str, object]:
    """Bytes under the pool root by split (None: unknown), and in the run directory."""
    blueprint, whole = request.blueprint, request.model_states()

    def size(pool: PoolRequest) -> int | None:
        return (
            None
            if pool.prompts is None
            else pool_bytes(blueprint, pool.prompts, pool.images, pool.rewards, request.itemsize)
        )

    pools = {name: size(pool) for name, pool in request.pools.items() if pool.stored}
    # a full policy is a whole pipeline in float32, an adapter its own weights
    policy = whole.gradients if request.training.lora else sum(pipeline_bytes(blueprint, 4).values())
    run = {"checkpoints": CHECKPOINTS * request.checkpoint, "policy": policy}
    return {"pools": {**pools, "total": _sum(pools.values())}, "run": {**run, "total": sum(run.values())}}


def _sum(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(known)


def hours(request: Request, arithmetic: Mapping[str, float]) -> dict[str, float | None]:
    """Hours of training, and of drawing all images, on all devices at the stated share of their peak.

    Not in it: rewards, text encoders, loading, and reading.
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
    """What the figures leave out or assume."""
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
        told.append(
            f"memory of these rewards is not known and left out: {', '.join(request.rewards.unknown)}"
        )
    if request.training.gpu and request.training.precision != "32-true":
        told.append("activations follow a GPU's autocast; on a CPU they are somewhat smaller")
    return told

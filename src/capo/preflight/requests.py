"""What a plan is asked about: training, sampling, pools and rewards of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from capo.backbones.precision import common_half
from capo.preflight.architecture import Blueprint
from capo.preflight.memory import ModelStates, checkpoint_bytes, model_states
from capo.preflight.tracing import Adapter
from capo.runtime.launch import FSDP, Division


@dataclass(frozen=True)
class TrainingRequest:
    """Settings of the training that a plan depends on.

    Attributes:
        division: how a step's pairs are divided over devices and forward passes.
        steps: number of optimizer steps.
        kinds: latents of a pair or group in a forward pass: 2 for a pair, or 1 for an objective of the winner
            alone, at each of its times.
        reference: whether the objective needs the reference's errors.
        precision: Lightning's name of the training precision.
        optimizer: name of the optimizer.
        strategy: `auto`, `ddp` or `fsdp`.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        lora: {rank, alpha, seed, targets} from `capo.preflight.tracing.adapter_of`, or None for all weights.
        gpu: whether autocast follows a GPU's rules; the plan assumes so unless the accelerator is the CPU.
        frozen_in: precision for which the weights that LoRA freezes are stored.
        local_processes: processes on each machine, one per device.
        inverting: forward passes in which the policy inverts each latent; 0: noise is added.
        moving: whether the reference follows the policy.
        averaged: whether averaged weights are kept, to be validated and exported.
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
    local_processes: int = 1
    inverting: int = 0
    moving: bool = False
    averaged: bool = False

    @property
    def holds_base(self) -> bool:
        """Whether the base is on the device in training: as the reference, or under an adapter."""
        return bool(self.lora) or (self.reference and not self.moving)

    @property
    def shards(self) -> int:
        """Number of devices over which policy, optimizer state and reference are sharded."""
        return self.division.devices if self.strategy == FSDP else 1

    @property
    def images(self) -> int:
        """Number of latents in one forward pass of a device."""
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
        other: whether a policy draws with the unconditional prediction of another network.
        foreign: whether that network is a policy of a folder, which nothing else of the run holds.
        plain: whether what draws is neither compiled nor laid out anew, so that it may be the reference too.
    """

    steps: int
    branches: int
    batch: int
    precision: str
    decode: int
    other: bool = False
    foreign: bool = False
    plain: bool = True


@dataclass(frozen=True)
class Judge:
    """A reward that scores images: its name, and a key that is equal for rewards that compute the same."""

    name: str
    key: str


OF_ROUNDS = "rounds"  # name of the pools that the policy draws in training, all of them together
# names of the policy's images on validation and test prompts
VALIDATED, EVALUATED = "policy in validation", "policy in evaluation"


@dataclass(frozen=True)
class PoolRequest:
    """Images of one split; `prompts` is None if their number is unknown until the prompt set is read."""

    prompts: int | None
    images: int  # per prompt
    rewards: int  # whose scores are stored
    times: int = 1  # how often the images are generated
    stored: bool = True
    judges: tuple[Judge, ...] = ()  # that score the images
    stage: str = ""  # of a run, in which all of its work falls; "": its text, latents and scores are stages
    encoded: bool = True  # whether its prompts are encoded, and not read from another pool
    in_run: int = 0  # how many the run directory holds at once, with their policies; 0: it is under the root


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
class Rates:
    """Units a second of one device that were measured or stated; None, or absent: not known.

    Attributes:
        text: prompts that are encoded.
        steps: denoising steps of one image.
        decoding: images that the VAE decodes.
        pairs: pairs in training steps.
        scoring: key of a `Judge` -> images that it scores.
        origins: name of a rate -> where it is from.
        faults: why files of measured rates are not used.
    """

    text: float | None = None
    steps: float | None = None
    decoding: float | None = None
    pairs: float | None = None
    scoring: Mapping[str, float] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[str] = ()


@dataclass(frozen=True)
class Request:
    """Inputs of a plan; sizes in bytes, and `flops` the peak FLOP/s of one device.

    Without `flops`, hours follow from `rates` alone.
    """

    blueprint: Blueprint
    training: TrainingRequest
    sampling: SamplingRequest
    pools: Mapping[str, PoolRequest]
    itemsize: int  # bytes per element of the base's weights in memory, and of its encoders' outputs
    flops: float | None
    utilization: float
    rewards: RewardRequest = RewardRequest()
    evaluate: bool = True  # whether the policy is evaluated after training
    export: str = "adapter"  # format of the policy: adapter, full or single_file
    exported_item: int = 4  # bytes per element of a policy that is a whole pipeline
    rates: Rates = Rates()
    peak_of: str = ""  # whose peak `flops` is, in words

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
            training.moving,
            training.averaged,
        )

    @property
    def shares_reference(self) -> bool:
        """Whether the reference is the base's denoiser as it draws (`Backbone.reference`), and no copy."""
        training, sampling = self.training, self.sampling
        stored = self.itemsize == 4 and sampling.precision == training.precision
        return training.holds_base and not training.lora and sampling.plain and stored

    @property
    def text_item(self) -> int:
        """Bytes per element of the text embeddings in a pool."""
        stored = common_half(self.sampling.precision, self.training.precision)
        return min(self.itemsize, stored.itemsize if stored else self.itemsize)

    @property
    def checkpoint(self) -> int:
        """Size of one checkpoint in bytes."""
        training = self.training
        averages = training.moving + training.averaged
        return checkpoint_bytes(self.blueprint, training.lora, training.optimizer, averages)

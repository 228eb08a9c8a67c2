"""Sections of the configuration that say how a model is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from capo.cli.schema.kinds import (
    Called,
    Count,
    Draw,
    DType,
    Name,
    Natural,
    NotNegative,
    Positive,
    Precision,
    Range,
    Rate,
    Seed,
    Text,
    Times,
    TwoOrMore,
)
from capo.runtime import limits
from capo.runtime.schema import Said, Section, key

Devices = Annotated[
    Literal["auto", -1]
    | Annotated[int, Field(ge=1)]
    | Annotated[str, Field(pattern=r"^\s*\d+\s*(,\s*\d+\s*)*$")]
    | Annotated[list[Natural], Field(min_length=1)],
    Said("a number of devices (-1: all), a list of their numbers, or auto"),
]


class Data(Section):
    """How batches are loaded."""

    workers: Annotated[int, Field(ge=0, le=limits.CORES)] | None = key(
        "loader processes of each device; null: 4 for a GPU, none for a CPU"
    )
    text: Literal["pool", "encode"] = key(
        "pool: read the stored embeddings; encode: compute them for each batch, on the CPU"
    )


class Selection(Section):
    """Which candidates of a prompt a batch holds, and which of them wins."""

    group: TwoOrMore = key("candidates of a prompt in a batch; above 2, for objectives that read groups")
    swap: bool = key(
        "true: winner and loser are exchanged, so that a negative model is trained, which is validated and "
        "evaluated as the unconditional prediction of the base"
    )


class Inversion(Section):
    """How an image is inverted (noise.source=inverted)."""

    steps: Times = key("steps of the inversion up to each sample's time")
    renoise: Annotated[int, Field(ge=0, le=limits.CORRECTIONS)] = key("corrections of each step (ReNoise)")
    eta: NotNegative = key("share of fresh noise in a step")


class Noise(Section):
    """Times and noise at which the errors are computed."""

    draw: Draw = key(
        "distribution of times: uniform; UNets: logsnr_normal, logsnr_normal_late; flows: logsnr_uniform, "
        "logit_normal"
    )
    times: Literal["independent", "stratified"] = key(
        "of consecutive pairs; stratified: evenly spread over them"
    )
    times_per_pair: Times = key("times, each with its own noise, at which a visit of a pair is evaluated")
    reduction: Literal["outside", "inside"] = key(
        "of several times: mean of their losses (outside), or loss of their mean margin (inside)"
    )
    shared: bool = key("true: winner and loser share their noise")
    weighting: Literal["sigmoid", "constant"] = key("weight of a time in the loss; constant: w = 1")
    source: Literal["drawn", "prior", "inverted"] = key(
        "drawn: fresh noise; prior: the noise that a candidate was sampled from; inverted: the policy's own "
        "inversion of the image"
    )
    inversion: Inversion = key("how an image is inverted")
    bias: float = key("bias b of the weight")


class Anchor(Section):
    """Penalty weight * relu(beta w (m+ - r+) - slack) on the winner's error above the reference's."""

    weight: NotNegative = key("factor of the penalty; 0: none")
    slack: NotNegative = key("excess of the winner's error that is free")


class Reference(Section):
    """What the policy is compared with: the base, or a moving average of the policy."""

    decay: Annotated[float, Field(ge=0, lt=1), Said("a number from 0 to less than 1")] | None = key(
        "share of the reference that an update keeps, the rest is the policy's; null: it stays the base"
    )
    interval: Count | None = key(
        "optimizer steps between updates of the reference; null: never, it stays the base"
    )


class Online(Section):
    """Candidates that the policy draws anew while it is trained."""

    every: Count | None = key(
        "optimizer steps of a round, after which the policy draws the candidates of the next; null: never"
    )
    prompts: Count | None = key("prompts of each round after the first, which take turns; null: all of them")
    keep: bool = key("true: keep the pools of earlier rounds, and the policies that drew them")


class Trainer(Section):
    """Optimizer, devices, precision and memory."""

    max_steps: Annotated[int, Field(ge=1, le=limits.STEPS)] = key("optimizer steps")
    batch: Annotated[int, Field(ge=1, le=limits.PAIRS)] = key("pairs in an optimizer step, over all devices")
    micro_batch: Count | None = key(
        "pairs in one forward pass on a device, the rest is accumulated; null: batch / devices"
    )
    lr: Rate = key("learning rate")
    warm_up: Natural = key("steps of linear warm-up")
    gradient_clip: Positive | None = key("largest gradient norm; null: no limit")
    signal_every: Natural | None = key(
        "steps between measurements of the signal in the gradient; 0: off; null: 10, up to 100M weights"
    )
    checkpoint_every: Count | None = key(
        "steps between checkpoints to resume from, besides those of validations"
    )
    max_bad_steps: Count = key(
        "consecutive steps with a gradient that is not finite, after which training stops"
    )
    pinned: Annotated[float, Field(ge=0, lt=1), Said("from 0 to less than 1")] = key(
        "share of the pairs that pin the prediction without a prompt to the base's"
    )
    ema: Annotated[float, Field(gt=0, lt=1), Said("a number above 0 and below 1")] | None = key(
        "decay of an exponential moving average of the weights, which validation and export use"
    )
    reuse_reference: bool = key(
        "true: keep the reference's errors in the pool, where later runs on the same batches find them"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = key(
        "adamw_8bit: moments in 8 bits (pip install 'capo[bitsandbytes]', CUDA)"
    )
    # none in which weights are stored in half precision: it would lose updates of 1e-5
    precision: Precision = key(
        "bf16-mixed, 16-mixed: autocast over float32 weights, with the reference in half precision"
    )
    gradient_checkpointing: bool = key("true: recompute activations within blocks in the backward pass")
    compile: bool = key("true: torch.compile of the repeated blocks")
    compile_tolerance: Positive = key(
        "largest |h| of the first batch with compile, as a share of the mean dR / beta"
    )
    channels_last: bool = key(
        "true: store convolutions with the channels last in memory, faster for UNets on a GPU"
    )
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = key("kind of device")
    strategy: Literal["auto", "ddp", "fsdp"] = key(
        "ddp, fsdp: one process per device, started by torchrun or srun (docs/training.md)"
    )
    devices: Devices = key("devices on each machine")
    num_nodes: Count = key("number of machines")
    log_every: Count = key("steps between lines of metrics.csv")


class Lora(Section):
    """Low-rank adapter that is trained in place of all weights."""

    rank: Annotated[int, Field(ge=1, le=limits.RANK)] = key("rank of the adapter")
    alpha: Annotated[float, Field(gt=0, le=limits.ALPHA)] = key("scale of the adapter, times the rank")
    seed: Seed = key("seed of its first weights", 0)


class Backbone(Section):
    """Arguments of every model family."""

    weights: Text = key("a folder in diffusers' format, or a hub id", later=True)
    revision: Text | None = key("commit, branch or tag of the hub id", None)
    variant: Text | None = key("variant of the weight files, such as fp16", None)
    dtype: DType = key("of the base, and so of the reference, in memory", "float32")
    scheduler: Text | None = key("a diffusers class that replaces the pipeline's own scheduler", None)
    channels_last: Annotated[list[Text], Said("a list of modules, [unet], say")] = key(
        "modules (unet, vae) with the channels last in memory: faster convolutions", []
    )
    vae: Text | None = key("folder or hub id of a VAE in place of the pipeline's own", None)
    vae_revision: Text | None = key("commit, branch or tag of that VAE", None)


class UNet(Backbone):
    """Arguments of SD1.5 and SDXL."""


class MMDiT(Backbone):
    """Arguments of SD3 and SD3.5."""

    t5: bool = key("false: the T5 is neither downloaded nor loaded; its tokens are zeros", True)
    sequence_length: Annotated[int, Field(ge=0, le=512)] = key("tokens of the T5", 256)


class NoArguments(Section):
    """Arguments of a function that takes none."""


BACKBONES = {"capo.backbones.UNetBackbone": UNet, "capo.backbones.MMDiTBackbone": MMDiT}
IMAGES: dict[str, type[Section]] = dict.fromkeys(
    ("capo.preflight.model_check.photograph", "capo.shapes.prompts.known_scenes"), NoArguments
)


class Model(Section):
    """The base, and what belongs to it."""

    name: Name = key("name of the model, in folders of pools")
    published: Text | None = key("published model whose architecture plans use without its weights", None)
    backbone: Annotated[Any, Called(BACKBONES)] = key("the model's family, and where its weights are")
    beta: Annotated[dict[Text, Positive | None], Said("beta by objective, {capo: 500}, say")] = key(
        "beta by objective, which the files of conf/objective/ take", {}
    )
    beta_range: Annotated[dict[Text, Range | None], Said("[lowest, highest] beta by objective")] | None = key(
        "lowest and highest beta that was measured, by objective; null: not measured", None
    )
    bias: float = key("bias b of the weight, which noise.bias takes")
    draw: Draw = key("distribution of times, which noise.draw takes")
    lr: Rate = key("learning rate, which trainer.lr takes")
    adapter_lr: Rate = key("learning rate of experiment=lora")
    lora: Lora | None = key("adapter to train; null: all weights are trained")
    known_images: Annotated[Any, Called(IMAGES)] = key(
        "pictures with captions, which check=true encodes and denoises"
    )

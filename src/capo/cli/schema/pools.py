"""Sections of the configuration that draw, store and judge images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from capo.cli.schema.kinds import Count, Positive, Precision, Seed, SeveralImages, Text, Times
from capo.cli.schema.rewards import HeldOut, Rewards
from capo.runtime import limits
from capo.runtime.schema import Said, Section, key


class Pool(Section):
    """Images of the base, shared by all runs."""

    root: Text = key("folder of candidates and of the base's images, shared by all runs")
    seed: Seed = key("seed of the candidates")
    candidates: SeveralImages = key("candidates per prompt")
    prompts_per_shard: Annotated[int, Field(ge=1, le=limits.SHARD)] = key("prompts in a file of the pool")
    imported: Text | None = key(
        "folder of a pool made by generate.py stage=import, from which all pairs then come"
    )
    labels: Literal["human", "rewards"] = key(
        "what orders the images of an imported pool: human choices, or this configuration's rewards"
    )


class Sampling(Section):
    """How images are drawn."""

    steps: Times = key("denoising steps")
    guidance: float = key(
        "scale of classifier-free guidance; from 0 to 1, no unconditional pass is made; below 0, images lead "
        "away from the prompt"
    )
    batch: Count = key("images in one forward pass, before guidance doubles them")
    decode: Count | None = key("images that the VAE decodes at once; null: as batch")
    unconditional: Text = key(
        "of the tuned policy's unconditional prediction: policy, base, or a FOLDER with another policy"
    )
    precision: Precision = key("of the denoiser; bf16-mixed, 16-mixed: autocast")
    parallel: Literal["operations", "batches"] = key(
        "operations: CPU threads share each operation; batches: each thread takes batches of its own"
    )
    channels_last: bool = key(
        "true: convolutions of what draws have the channels last in memory, for UNets on a GPU"
    )
    compile: bool = key("true: torch.compile of each repeated block of what draws")


class Validation(Section):
    """Images of the policy in training, by which the checkpoint is chosen."""

    every: Count = key("optimizer steps between validations")
    images: SeveralImages = key("images per prompt")
    monitor: Literal["mean", "worst"] = key(
        "win-rate that chooses the checkpoint: the mean over the rewards, or that of the worst one"
    )
    strengths: (
        Annotated[list[Annotated[float, Field(gt=0, le=1)]], Said("a list of numbers above 0 and at most 1")]
        | None
    ) = key("at the end, also try base + a (policy - base) for these a, and export the best")
    pictures: Count = key("prompts in the image grid")
    held_out: HeldOut | None = key(
        "rewards not used in training, which detect reward hacking", group="rewards"
    )


class Evaluation(Section):
    """Test images of policy and base."""

    seed: Seed = key("seed of validation and test images, and of the bootstrap")
    images: SeveralImages = key("images per prompt")
    zero_prompts: Count = key("test prompts on which the base is compared with itself at other seeds")
    diversity: Text | None = key(
        "reward whose image encoder measures diversity; auto: the first that has one; null: latents alone"
    )
    diversity_prompts: Count = key("prompts whose images are decoded for that, evenly spaced")
    rewards: Rewards = key("rewards of the evaluation", group="rewards")
    oracle: Rewards | None = key("exact measures to report beside the rewards, written like rewards")


class Planning(Section):
    """What plan=true assumes."""

    flops: Annotated[float, Field(ge=10**6, le=10**20)] | None = key(
        "peak of one device per second; null: this machine's GPU by its name, else an H100 SXM"
    )
    utilization: Annotated[float, Field(ge=10**-4, le=1), Said("a number from 0.0001 to 1")] = key(
        "share of that peak that training and sampling reach; an assumption, not measured"
    )
    scoring: (
        Annotated[dict[Text, Positive], Said("images a second by reward: 'planning.scoring={pickscore: 50}'")]
        | None
    ) = key("images a second of one device by reward; stated by you, not measured")


class PairExport(Section):
    """What generate.py stage=export writes."""

    file: Text = key("the file")
    per_prompt: Count | None = key(
        "pairs of the first visits of a prompt in training with the same seed; null: every pair"
    )
    images: Literal["jpeg", "png"] = key("png: lossless, several times as large")
    row_group: Count = key("pairs in memory at a time")

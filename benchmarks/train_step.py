"""Pairs per second of the training step, compared with other ways to take it.

    python -m benchmarks.train_step [--batch 16] [--prompts 64] [--steps 5] [--runs 9] [--threads 2]
                                    [--model shapes_unet]

`capo` is `capo.training.fit.fit` with its loader, logged figures, curves and progress bar. It is compared
with:

- `bare loop`: the same loader, module step and figures without Lightning. It takes exactly the same steps;
  the last line of output is the largest difference between the weights of the two.
- `four passes`: the same batches, with separate passes for winners and losers through policy and reference.
- `published`: as published trainers do it. Every step encodes both images of each pair with the VAE in
  float32, 8 at a time, and the prompts with the text encoders; then policy and reference run on 2B latents.
  The images are in memory, decoded and of the right size: reading and resizing them is not timed.

All take turns in one process on the CPU: in each round, `steps` steps of each; `runs` rounds after one for
warm-up. The pool has random latents and scores for prompts of the shapes world, whose text is encoded by the
model. The script prints medians, and the medians over rounds of the ratios.

With `--size full`: SDXL and SD3-Medium on a GPU (`full_training.py`).
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.configuration import model_and_sizes
from benchmarks.full_steps import four_pass_loss
from benchmarks.synthetic import synthetic_pool, synthetic_rewards
from benchmarks.timing import print_rates
from capo.backbones import Backbone
from capo.backbones.averaging import WeightAverage
from capo.backbones.sampling import SamplerSettings
from capo.cli.build import moving_reference
from capo.data import PreferenceBatch
from capo.data.candidates import select_candidates
from capo.data.dataset import PairDataset
from capo.data.generation import ImageGenerator, PoolSpec
from capo.module import PreferenceModule, Weighting
from capo.pairs import frs
from capo.runtime.run_folder import MONITOR
from capo.training.fit import fit
from capo.training.loader import PreferenceData
from capo.training.loggers import csv_logger

CANDIDATES = 16
VAE_BATCH = 8  # images encoded at a time, as in published trainers
OURS, BARE, FOUR, PUBLISHED = "capo", "bare loop", "four passes", "published"
Module = TypeVar("Module", bound=PreferenceModule)
Steps = Iterator[Tensor]  # each `next` takes an optimizer step and gives its loss


class Bare(PreferenceModule):
    """Training module that runs without a trainer: it counts its steps itself and does not log."""

    global_step = 0  # pyright: ignore[reportAssignmentType]  # Lightning's is a property

    def log(self, *args, **kwargs) -> None:
        """Do nothing."""


def stepping(module: Bare, losses: Iterator[Tensor]) -> Steps:
    """Take an optimizer step for every loss, with the module's optimizer, warm-up and clipping."""
    configured, followers, trainer = (
        module.configure_optimizers(),
        module.configure_callbacks(),
        cast(Any, module),
    )
    optimizer, warm_up = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for loss in losses:
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        module.take_figures()
        module.global_step += 1  # pyright: ignore[reportAttributeAccessIssue]
        for follower in followers:  # of which only the step is asked of the trainer
            follower.on_train_batch_end(trainer, module, None, None, 0)
        yield loss.detach()


def bare_losses(module: Bare, data: PreferenceData) -> Iterator[Tensor]:
    """Losses of the module's training step on the loader's batches."""
    for index, pairs in enumerate(data.train_dataloader()):
        yield module.training_step(pairs, index)


def four_pass_losses(module: Bare, data: PreferenceData) -> Iterator[Tensor]:
    """Losses of the same batches from four forward passes of B latents."""
    for pairs in data.train_dataloader():
        yield four_pass_loss(module, pairs)


def published_losses(module: Bare, prompts: Sequence[str], batch: int) -> Iterator[Tensor]:
    """Losses of random images, with images and prompts encoded in every step.

    The passes through policy and reference are those of the module.
    """
    backbone, draw = module.backbone, torch.Generator().manual_seed(0)
    height, width = (backbone.pipeline.vae_scale_factor * side for side in backbone.latent_shape[1:])
    images = torch.randint(0, 256, (len(prompts), 2, 3, height, width), generator=draw, dtype=torch.uint8)
    rewards = torch.tensor([[0.6, 0.4]]).expand(batch, 2)
    while True:
        rows = torch.randint(len(prompts), (batch,), generator=draw)
        texts, pixels = [prompts[int(row)] for row in rows], images[rows].flatten(0, 1) / 127.5 - 1
        latents = torch.cat([backbone.encode_images(part) for part in pixels.split(VAE_BATCH)]).unflatten(
            0, (batch, 2)
        )
        noise, u = torch.randn(latents.shape, generator=draw), torch.rand(batch, generator=draw)
        pairs = PreferenceBatch(latents, noise, u, rewards, backbone.encode_prompts(texts), texts)
        yield module.objective(module.pair_errors(pairs)).mean()


class Rounds(L.Callback):
    """Callback in place of `fit`'s validation: after `steps` trainer steps, each other way takes as many.

    `rounds` maps each way to the seconds of its rounds. All time between the trainer's steps is counted as
    the trainer's, except the turns of the others.
    """

    def __init__(self, others: Mapping[str, Steps], steps: int):
        self.others, self.steps = dict(others), steps
        self.rounds: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
        # read by `fit`, its checkpoint callback and its curves, which do not count the others' seconds
        self.validated, self.chosen, self.average, self.seconds = 0, True, WeightAverage(None), 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args) -> None:
        """At the end of each round, record the trainer's time and give the other ways their turns."""
        if trainer.global_step % self.steps:
            return
        self.rounds[OURS].append(time.perf_counter() - self._since)
        begun = time.perf_counter()
        for name in self.others:
            self._turn(name)
        self.seconds += time.perf_counter() - begun
        if trainer.global_step == trainer.max_steps:
            module.log(MONITOR, 0.5, logger=False)  # `fit` needs a value to choose the best checkpoint
            self.validated = trainer.global_step
        self._since = time.perf_counter()

    def _turn(self, name: str) -> None:
        start = time.perf_counter()
        with torch.enable_grad():
            *_, loss = islice(self.others[name], self.steps)
        self.rounds[name].append(time.perf_counter() - start)
        if not loss.isfinite():
            raise RuntimeError(f"{name}: the loss is {loss}")


def make_dataset(cfg: DictConfig, backbone: Backbone, folder: Path) -> PairDataset:
    """Dataset of pairs for the configuration's training prompts: encoded text, random latents and scores."""
    rewards, prompts = synthetic_rewards(3), instantiate(cfg.prompts)["train"]
    plan = PoolSpec(folder, cfg.model.name, "train", 0, prompts, CANDIDATES)
    pool = synthetic_pool(plan, ImageGenerator.base(backbone, SamplerSettings(**cfg.sampling)), rewards)
    return select_candidates(
        pool,
        prompts,
        CANDIDATES,
        rewards,
        frs,
        cfg.calibration,
        cfg.seed,
        cfg.noise.shared,
        group=cfg.selection.group,
    ).dataset


def module_maker(cfg: DictConfig, backbone: Backbone) -> Callable[[type[Module]], Module]:
    """Function from a module class to a module of the configuration, whose policy is untrained."""
    trainer, weighting = cfg.trainer, Weighting(cfg.noise.weighting, cfg.noise.bias)
    return lambda kind: kind(
        backbone,
        instantiate(cfg.objective),
        lr=trainer.lr,
        warm_up=trainer.warm_up,
        weighting=weighting,
        gradient_clip=trainer.gradient_clip,
        moving=moving_reference(cfg),
    )


def time_steps(
    cfg: DictConfig, batch: int, steps: int, runs: int, folder: Path
) -> tuple[dict[str, list[float]], float]:
    """Time all ways to take a step.

    Returns the seconds of every way's rounds but the first, and the largest difference between the weights of
    `capo` and of the bare loop.
    """
    backbone = instantiate(cfg.model.backbone, name=cfg.model.name)
    dataset, make = make_dataset(cfg, backbone, folder), module_maker(cfg, backbone)
    bare, four, published, ours = make(Bare), make(Bare), make(Bare), make(PreferenceModule)
    texts = [prompt.text for prompt in dataset.prompts]
    rounds: Any = Rounds(  # in the place of a validation
        {
            BARE: stepping(bare, bare_losses(bare, PreferenceData(dataset, batch))),
            FOUR: stepping(four, four_pass_losses(four, PreferenceData(dataset, batch))),
            PUBLISHED: stepping(published, published_losses(published, texts, batch)),
        },
        steps,
    )
    fit(
        ours,
        PreferenceData(dataset, batch),
        rounds,
        [csv_logger(folder)],
        folder,
        max_steps=steps * (runs + 1),
        log_every=cfg.trainer.log_every,
        accelerator="cpu",
        devices=1,
        precision=cfg.trainer.precision,
        accumulate=1,
    )
    weights = zip(ours.policy.parameters(), bare.policy.parameters(), strict=True)
    apart = max((one - other).abs().max().item() for one, other in weights)
    return {name: found[1:] for name, found in rounds.rounds.items()}, apart


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the command line asks for, and print the figures."""
    if any(argument.startswith("--size") for argument in (sys.argv[1:] if arguments is None else arguments)):
        from benchmarks import full_training  # here, since it takes a while to import

        full_training.main(arguments)
        return
    defaults = {"batch": 16, "prompts": 64, "steps": 5, "runs": 9, "threads": 2}
    args, cfg = model_and_sizes(str(__doc__), defaults, arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds, apart = time_steps(cfg, args.batch, args.steps, args.runs, Path(folder))
    print(
        f"{args.model}, {args.batch} pairs a step, {args.threads} threads, "
        f"median of {args.runs} rounds of {args.steps} steps"
    )
    print_rates(seconds, args.batch * args.steps, "pairs", OURS)
    print(f"weights of {OURS} and {BARE} after their last step: {apart:g} apart at most")


if __name__ == "__main__":
    main()

"""Pairs per second of the training step, against other ways to take it.

    python benchmarks/train_step.py [--batch 16] [--prompts 64] [--steps 5] [--runs 9] [--threads 2]
                                    [--model shapes_unet]

`capo` is `capo.training.fit.fit` with all that belongs to it: loader, figures, curves, progress bar. Against it:

- `bare loop`: the same loader, module step and figures without Lightning. It takes the very same steps; the last
  line says how far the weights of the two are from each other.
- `four passes`: the same batches; policy and reference on the winners and on the losers, a pass each.
- `published`: what published trainers do. In every step both images of each pair go through the VAE's encoder in
  float32, 8 at a time, and the prompts through the text encoders; then policy and reference on 2B latents. Its
  images lie in memory, decoded and of the right size: reading and resizing them is not counted.

All take turns in one process: `steps` steps of each a round, `runs` rounds after one that warms up. The pool holds
random latents and scores for prompts of the shapes world, whose texts are encoded. Prints medians, and medians of each
round's ratios. On the CPU.

With `--size full`: SDXL and SD3-Medium on a GPU (`full_training.py`).
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
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
from configuration import model_and_sizes
from full_steps import four_pass_loss
from synthetic import synthetic_pool, synthetic_rewards
from timing import print_rates

CANDIDATES = 16
VAE_BATCH = 8  # images through the encoder at once, as published trainers have it
OURS, BARE, FOUR, PUBLISHED = "capo", "bare loop", "four passes", "published"
Steps = Iterator[Tensor]  # each `next` takes an optimizer step and gives its loss


class Bare(PreferenceModule):
    """The module without a trainer: it counts its steps itself and has no progress bar to log to."""

    global_step = 0

    def log(self, *args, **kwargs) -> None:
        """To nobody."""


def stepping(module: Bare, losses: Iterator[Tensor]) -> Steps:
    """An optimizer step for every loss, with the module's own optimizer, warm-up and clipping."""
    configured = module.configure_optimizers()
    optimizer, warm_up = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for loss in losses:
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        module.take_figures()
        module.global_step += 1
        yield loss.detach()


def bare_losses(module: Bare, data: PreferenceData) -> Iterator[Tensor]:
    """The module's own step on its own batches."""
    for index, pairs in enumerate(data.train_dataloader()):
        yield module.training_step(pairs, index)


def four_pass_losses(module: Bare, data: PreferenceData) -> Iterator[Tensor]:
    """The same losses from four forward passes of B."""
    for pairs in data.train_dataloader():
        yield four_pass_loss(module, pairs)


def published_losses(module: Bare, prompts: Sequence[str], batch: int) -> Iterator[Tensor]:
    """Everything from images and words in every step; the passes through policy and reference are ours."""
    backbone, draw = module.backbone, torch.Generator().manual_seed(0)
    height, width = (backbone.pipeline.vae_scale_factor * side for side in backbone.latent_shape[1:])
    images = torch.randint(0, 256, (len(prompts), 2, 3, height, width), generator=draw, dtype=torch.uint8)
    rewards = torch.tensor([[0.6, 0.4]]).expand(batch, 2)
    while True:
        rows = torch.randint(len(prompts), (batch,), generator=draw)
        texts, pixels = [prompts[row] for row in rows], images[rows].flatten(0, 1) / 127.5 - 1
        latents = torch.cat([backbone.encode_images(part) for part in pixels.split(VAE_BATCH)]).unflatten(
            0, (batch, 2)
        )
        noise, u = torch.randn(latents.shape, generator=draw), torch.rand(batch, generator=draw)
        pairs = PreferenceBatch(latents, noise, u, rewards, backbone.encode_prompts(texts), texts)
        yield module.objective(module.pair_errors(pairs)).mean()


class Rounds(L.Callback):
    """Stands where `fit` has its validation: after every `steps` steps of the trainer each of the others takes as many.

    `seconds` has what every round took; all that lies between two steps of the trainer, but for these turns of the
    others, is counted as the trainer's.
    """

    def __init__(self, others: Mapping[str, Steps], steps: int):
        self.others, self.steps = dict(others), steps
        self.seconds: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
        self.validated = 0  # read by the checkpoint callback

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args) -> None:
        """Nothing until a round is over."""
        if trainer.global_step % self.steps:
            return
        self.seconds[OURS].append(time.perf_counter() - self._since)
        for name in self.others:
            self._turn(name)
        if trainer.global_step == trainer.max_steps:
            module.log(MONITOR, 0.5, logger=False)  # `fit` keeps the best checkpoint and wants one
            self.validated = trainer.global_step
        self._since = time.perf_counter()

    def _turn(self, name: str) -> None:
        start = time.perf_counter()
        with torch.enable_grad():
            *_, loss = islice(self.others[name], self.steps)
        self.seconds[name].append(time.perf_counter() - start)
        if not loss.isfinite():
            raise RuntimeError(f"{name}: the loss is {loss}")


def make_dataset(cfg: DictConfig, backbone: Backbone, folder: Path) -> PairDataset:
    """Pairs of the configuration's training prompts: encoded texts, random latents and scores."""
    rewards, prompts = synthetic_rewards(3), instantiate(cfg.prompts)["train"]
    plan = PoolSpec(folder, cfg.model.name, "train", 0, prompts, CANDIDATES)
    pool = synthetic_pool(plan, ImageGenerator.base(backbone, SamplerSettings(**cfg.sampling)), rewards)
    return select_candidates(
        pool, prompts, CANDIDATES, rewards, frs, cfg.calibration, cfg.seed, cfg.noise.shared
    ).dataset


def module_maker(cfg: DictConfig, backbone: Backbone) -> Callable[[type], PreferenceModule]:
    """Class -> a module of the configuration, its policy still the base."""
    trainer, weighting = cfg.trainer, Weighting(cfg.noise.weighting, cfg.noise.bias)
    return lambda kind: kind(
        backbone,
        instantiate(cfg.objective),
        lr=trainer.lr,
        warm_up=trainer.warm_up,
        weighting=weighting,
        gradient_clip=trainer.gradient_clip,
    )


def time_steps(
    cfg: DictConfig, batch: int, steps: int, runs: int, folder: Path
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every way's rounds but the first; largest difference of the weights of `capo` and the bare loop."""
    backbone = instantiate(cfg.model.backbone, name=cfg.model.name)
    dataset, make = make_dataset(cfg, backbone, folder), module_maker(cfg, backbone)
    bare, four, published, ours = make(Bare), make(Bare), make(Bare), make(PreferenceModule)
    texts = [prompt.text for prompt in dataset.prompts]
    rounds = Rounds(
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
    return {name: found[1:] for name, found in rounds.seconds.items()}, apart


def main(arguments: Sequence[str] | None = None) -> None:
    if any(argument.startswith("--size") for argument in (sys.argv[1:] if arguments is None else arguments)):
        import full_training  # which takes its time

        full_training.main(arguments)
        return
    defaults = {"batch": 16, "prompts": 64, "steps": 5, "runs": 9, "threads": 2}
    args, cfg = model_and_sizes(__doc__, defaults, arguments)
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

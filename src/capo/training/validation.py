"""Validate the policy during training: sample fixed prompts and seeds, and compare with the base's images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics import MeanMetric
from tqdm import tqdm

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings, sample_prompts
from capo.data.images import GeneratedImages
from capo.data.prompts import Prompt, candidate_seed
from capo.evaluation.held_out import GROUP, HeldOut, by_prompt, judge
from capo.evaluation.reports.page import image_grid
from capo.metrics import WinRate, win_rate
from capo.module import PreferenceModule
from capo.rewards import Reward
from capo.runtime.processes import gathered
from capo.runtime.run_folder import MONITOR
from capo.runtime.threads import OPERATIONS
from capo.training.loggers import log_picture


@dataclass(frozen=True)
class ValidationSet:
    """Fixed prompts and seeds of validation, and what the base reaches on them.

    Attributes:
        prompts: P prompts.
        text: text conditioning of the prompts by name; the leading dimension is P.
        seeds: P lists of K seeds, one per image.
        base_scores: reward -> (P, K) raw scores of the base's images for the same prompts and seeds.
        pictures: the base's first image of each of the first prompts, for the image grid.
    """

    prompts: Sequence[Prompt]
    text: dict[str, Tensor]
    seeds: list[list[int]]
    base_scores: dict[str, Tensor]
    pictures: list[Image]


def validation_set(base: GeneratedImages, rewards: Sequence[Reward], pictures: int) -> ValidationSet:
    """Validation set from the base's images, which must be complete; `pictures` prompts go into the grid."""
    pool, spec, positions = base.pool, base.spec, base.positions
    parts = [pool.read_text(row) for row in pool.text_shards(positions)]
    rows = [position for row in pool.text_shards(positions) for position in pool.text_shard(row).positions]
    places = torch.tensor([rows.index(position) for position in positions])
    text = {name: torch.cat([part[name] for part in parts])[places] for name in parts[0]}
    seeds = [
        [candidate_seed(spec.seed, prompt.id, index) for index in range(spec.candidates)]
        for prompt in spec.prompts
    ]
    shown = [base.images(row)[0] for row in range(min(pictures, len(spec.prompts)))]
    return ValidationSet(list(spec.prompts), text, seeds, base.scores(rewards), shown)


def share(prompts: int, rank: int, world: int) -> tuple[list[int], list[int]]:
    """Prompts of process `rank` of `world`: (rows to sample, rows that count).

    Every process samples the same number of prompts, since a sharded policy must be called equally often by
    all. A process whose share is smaller repeats the last prompt; these repetitions do not count.
    """
    mine = list(range(rank, prompts, world))
    return mine + [prompts - 1] * (math.ceil(prompts / world) - len(mine)), mine


class WinRateValidation(L.Callback):
    """Every `every` optimizer steps, log win-rates of the policy against the base and draw a grid of images.

    Checkpoints are ranked by `val/win_rate`, the mean over the rewards used in training. Latents are rounded
    to float16 before they are decoded, as in a pool. Each process samples its share of the prompts; metrics
    are summed over processes, so that all choose the same checkpoint. VAE and text encoders are moved to the
    device for the duration of a validation.

    Held-out rewards (`held_out`) score the same images but do not enter `val/win_rate`. If one of them falls
    below the base while the rewards used in training rise above it, a warning of reward hacking is printed.
    """

    def __init__(
        self,
        base: ValidationSet,
        backbone: Backbone,
        rewards: Sequence[Reward],
        settings: SamplerSettings,
        every: int,
        folder: Path,
        held_out: HeldOut | None = None,
    ):
        self.held_out = held_out or HeldOut()
        self.base, self.backbone, self.rewards, self.settings = base, backbone, list(rewards), settings
        self.every, self.folder = every, Path(folder)
        self.validated = 0  # the last step after which the policy was validated

    def on_train_batch_end(
        self, trainer: L.Trainer, module: PreferenceModule, outputs, batch, index: int
    ) -> None:
        """Validate every `every` optimizer steps and after the last one; log and print the figures."""
        step = trainer.global_step
        last = trainer.max_steps > 0 and step == trainer.max_steps
        if step == self.validated or not (step % self.every == 0 or last):
            return
        self.validated = step
        begun = time.perf_counter()
        figures, alarm = self.validate(trainer, module.policy, step)
        module.log_dict(figures, logger=False)
        figures["time/validation_seconds"] = time.perf_counter() - begun
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        rates = "  ".join(
            f"{name.removeprefix('val/win_rate/')} {value:.3f}"
            for name, value in figures.items()
            if name.startswith("val/win_rate/")
        )
        module.print(f"step {step}: win-rate against the base {figures[MONITOR]:.3f}  ({rates})")
        if alarm:
            module.print(alarm)

    @torch.no_grad()
    def validate(
        self, trainer: L.Trainer, policy: torch.nn.Module, step: int
    ) -> tuple[dict[str, float], str | None]:
        """Sample and score the validation prompts with `policy`.

        Returns:
            Figures by name (win-rates and mean scores), and the reward-hacking warning or None.
        """
        was_training = policy.training
        policy.eval()
        drawn, mine = share(len(self.base.prompts), trainer.global_rank, trainer.world_size)
        with self.backbone.visiting(trainer.strategy.root_device):
            latents = self._sample(policy, drawn, trainer.is_global_zero, alone=trainer.world_size == 1)
            policy.train(was_training)
            images = (
                self.backbone.decode(latents[: len(mine)].flatten(0, 1), batch=self.settings.decoded)
                if mine
                else []
            )
        figures, alarm = self._figures(images, mine, step, trainer.strategy.root_device)
        shown = self._shown(images, mine)
        if trainer.is_global_zero:
            log_picture(trainer.loggers, "validation", self._draw(shown, step), step)
        return figures, alarm

    def _sample(self, policy, drawn: list[int], progress: bool, alone: bool) -> Tensor:
        # with several processes no batches run in parallel threads: every pass through a sharded policy is a
        # collective operation, and threads would start these in a different order on each process
        settings = self.settings if alone else replace(self.settings, parallel=OPERATIONS)
        seeds = [self.base.seeds[row] for row in drawn]
        text = {name: value[drawn] for name, value in self.base.text.items()}
        total = len(seeds) * len(seeds[0]) * settings.steps
        with tqdm(
            total=total, desc="validation", unit="image step", leave=False, disable=not progress
        ) as bar:
            latents = sample_prompts(self.backbone, policy, text, seeds, settings, bar.update)
        return latents.to(torch.float16).float()

    def _figures(
        self, images: list[Image], mine: list[int], step: int, device: torch.device
    ) -> tuple[dict[str, float], str | None]:
        """Figures and warning from the images of all processes, identical on each of them."""
        figures: dict[str, float] = {}
        rates: dict[str, dict[int, float]] = {}  # reward -> {prompt: win-rate}, for this process's share
        for group, rewards in {"val": self.rewards, GROUP: self.held_out.rewards}.items():
            for reward in rewards:
                found, rates[reward.name] = self._judged(reward, images, mine, device)
                figures |= {f"{group}/{kind}/{reward.name}": value for kind, value in found.items()}
        own = [figures[f"{MONITOR}/{reward.name}"] for reward in self.rewards]
        figures = {MONITOR: sum(own) / len(own), **figures}
        if not self.held_out.rewards:
            return figures, None
        everyones = by_prompt(gathered(rates))
        held_out = {reward.name: everyones.pop(reward.name) for reward in self.held_out.rewards}
        verdict = judge(list(everyones.values()), held_out, self.held_out.seed)
        return figures | verdict.figures(), verdict.message(step)

    def _judged(
        self, reward: Reward, images: list[Image], mine: list[int], device: torch.device
    ) -> tuple[dict[str, float], dict[int, float]]:
        """Figures of one reward over all processes, and the win-rates of this process's prompts."""
        per_prompt = len(self.base.seeds[0])
        prompts = [self.base.prompts[row].text for row in mine for _ in range(per_prompt)]
        rate, score, rates = WinRate(), MeanMetric(), {}
        if mine:
            reward.setup(device)  # one reward at a time: beside the policy there may be no room for all
            scores, base = (
                reward.score(images, prompts).view(len(mine), per_prompt),
                self.base.base_scores[reward.name][mine],
            )
            reward.offload()
            rate.update(scores, base)
            score.update(scores)
            rates = dict(zip(mine, win_rate(scores, base).tolist(), strict=True))
        return {"win_rate": float(rate.compute()), "score": float(score.compute())}, rates

    def _shown(self, images: list[Image], mine: list[int]) -> list[Image]:
        """The policy's first image of each of the first prompts, gathered from all processes."""
        per_prompt = len(self.base.seeds[0])
        own = {
            row: images[number * per_prompt]
            for number, row in enumerate(mine)
            if row < len(self.base.pictures)
        }
        found = {row: image for part in gathered(own) for row, image in part.items()}
        return [found[row] for row in sorted(found)]

    def _draw(self, shown: list[Image], step: int) -> Path:
        path = self.folder / f"step{step:06d}.png"
        image_grid(
            self.base.pictures, shown, [prompt.text for prompt in self.base.prompts[: len(shown)]], path
        )
        return path

    def state_dict(self) -> dict[str, int]:
        """The last validated step, so that a resumed run does not validate it again."""
        return {"validated": self.validated}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the last validated step."""
        self.validated = state["validated"]

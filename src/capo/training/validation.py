"""During training: sample fixed prompts and seeds, score, compare with the base's images, draw a picture."""

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
from capo.rewards import Reward
from capo.runtime.processes import gathered
from capo.runtime.run_folder import MONITOR
from capo.runtime.threads import OPERATIONS
from capo.training.loggers import log_picture


@dataclass(frozen=True)
class ValidationSet:
    """The base's side of every comparison.

    Attributes:
        prompts: P prompts, with text conditioning `text` (leading P) and seeds (P x K) of their images.
        base_scores: reward -> (P, K) raw scores of the base's images for the same seeds.
        pictures: the base's first image of the first prompts, for the grid.
    """

    prompts: Sequence[Prompt]
    text: dict[str, Tensor]
    seeds: list[list[int]]
    base_scores: dict[str, Tensor]
    pictures: list[Image]


def validation_set(base: GeneratedImages, rewards: Sequence[Reward], pictures: int) -> ValidationSet:
    """Read from the base's images, which must be complete, what validation compares with."""
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
    """(rows that a process draws, those of them that count): as many for each process as for any other.

    What is drawn beyond its share repeats the last prompt: a sharded policy must be called equally often everywhere.
    """
    mine = list(range(rank, prompts, world))
    return mine + [prompts - 1] * (math.ceil(prompts / world) - len(mine)), mine


class WinRateValidation(L.Callback):
    """Every `every` optimizer steps: win-rates of the policy against the base, logged, and a grid of images.

    `val/win_rate`, the mean over rewards, is what checkpoints are compared by. Images are rounded to float16 before they
    are decoded, as those of a pool are. Each process takes its share of the prompts; the metrics add them up, so that all
    choose the same checkpoint. VAE and text encoders are on the device for as long as this takes.

    The rewards of `held_out` score the same images and have no part in `val/win_rate`; where they fall while training's own
    rise, a line says so.
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
        self.validated = 0  # the last step after which this was done

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, index: int
    ) -> None:
        """Validate every `every` steps and after the last one."""
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
        """Win-rates and mean scores of `policy` on the validation prompts; the alarm, where a held-out reward falls."""
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
        # among others no lanes: each pass through a sharded policy is a conversation, which threads would start in any order
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
        """Of all processes' images together: the same in each of them."""
        figures: dict[str, float] = {}
        rates: dict[str, dict[int, float]] = {}  # reward -> {prompt: win-rate} of this process's share
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
        """Win-rate and mean score of all processes' images, and the win-rates of the prompts that this one has drawn."""
        per_prompt = len(self.base.seeds[0])
        prompts = [self.base.prompts[row].text for row in mine for _ in range(per_prompt)]
        rate, score, rates = WinRate(), MeanMetric(), {}
        if mine:
            reward.setup(device)  # one after the other: beside the policy there may be no room for all
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
        """The policy's first image of the first prompts, whichever process has drawn it."""
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
        return {"validated": self.validated}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.validated = state["validated"]

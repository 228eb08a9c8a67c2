"""Validate the policy during training: sample fixed prompts and seeds, and compare with the base's images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics import MeanMetric
from tqdm import tqdm

from capo.backbones import Backbone
from capo.backbones.averaging import WeightAverage
from capo.backbones.sampling import SamplerSettings, sample_prompts
from capo.data.images import GeneratedImages
from capo.data.prompts import Prompt, candidate_seed
from capo.evaluation.held_out import GROUP, HeldOut, by_prompt, judge
from capo.evaluation.reports.gallery import image_grid
from capo.metrics import WinRate
from capo.module import PreferenceModule
from capo.rewards import Reward
from capo.runtime.processes import gathered
from capo.runtime.run_folder import MONITOR
from capo.runtime.threads import OPERATIONS
from capo.training.choice import Choice, monitored
from capo.training.trackers import log_picture
from capo.training.unconditional import UnconditionalBranch
from capo.win_rates import win_rate


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


@dataclass(frozen=True)
class Place:
    """Where validation images are sampled: this process's device and rank, and the number of processes."""

    device: torch.device
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Validated:
    """Result of a validation, identical on all processes.

    Attributes:
        figures: win-rates and mean scores by name.
        rates: reward used in training -> win-rates (P,) of the validation prompts.
        alarm: the warning of reward hacking, or None.
        shown: the policy's first image of each of the first prompts, for the image grid.
    """

    figures: dict[str, float]
    rates: dict[str, Tensor]
    alarm: str | None
    shown: list[Image]


class WinRateValidation(L.Callback):
    """Every `every` optimizer steps, log win-rates of the policy against the base and draw a grid of images.

    `val/win_rate` is the mean over the rewards used in training, or the worst one's win-rate
    (`choice.monitor`); `choice` decides by it which checkpoint is the best. With an `average`, the averaged
    weights are validated; `unconditional` makes the unconditional prediction in place of the policy, or knows
    the policy as a negative model, which makes that of the base. Latents
    are rounded to float16 before they are decoded, as in a pool. Each process samples its share of the
    prompts; metrics are summed over processes, so that all choose the same checkpoint. VAE and text encoders
    are moved to the device for the duration of a validation.

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
        choice: Choice | None = None,
        average: WeightAverage | None = None,
        unconditional: UnconditionalBranch | None = None,
    ):
        self.unconditional = unconditional  # None: the policy's own
        self.average = average or WeightAverage(None)
        self.choice = choice or Choice()
        self.chosen = False  # whether the policy validated last is the best so far
        self.held_out = held_out or HeldOut()
        self.base, self.backbone, self.rewards, self.settings = base, backbone, list(rewards), settings
        self.every, self.folder = every, Path(folder)
        self.validated = 0  # the last step after which the policy was validated
        self.seconds = 0.0  # spent on validation by this process

    def follow(self, module: PreferenceModule) -> None:
        """Validate the policy of another module of the same kind from now on."""
        if self.unconditional is not None:
            self.unconditional = replace(self.unconditional, module=module)

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
        place = Place(trainer.strategy.root_device, trainer.global_rank, trainer.world_size)
        with self.average.applied(module):
            found = self.validate(module.policy, place, f"step {step}")
        self.chosen = self.choice.offer(f"step {step}", found.rates)
        module.log_dict(found.figures, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(
                found.figures | {"time/validation_seconds": time.perf_counter() - begun}, step=step
            )
        if trainer.is_global_zero:
            log_picture(trainer.loggers, "validation", self._draw(found.shown, step), step)
        self.seconds += time.perf_counter() - begun
        module.print(f"step {step}: win-rate against the base {told(found.figures)}")
        if found.alarm:
            module.print(found.alarm)

    @torch.no_grad()
    def validate(self, policy: torch.nn.Module, place: Place, name: str) -> Validated:
        """Sample and score the validation prompts with `policy`, called `name` in a warning."""
        was_training = policy.training
        policy.eval()
        drawn, mine = share(len(self.base.prompts), place.rank, place.world)
        with self.backbone.visiting(place.device):
            latents = self._sample(policy, drawn, place)
            policy.train(was_training)
            images = (
                self.backbone.decode(latents[: len(mine)].flatten(0, 1), batch=self.settings.decoded)
                if mine
                else []
            )
        figures, rates, alarm = self._figures(images, mine, name, place.device)
        return Validated(figures, rates, alarm, self._shown(images, mine))

    def _sample(self, policy: torch.nn.Module, drawn: list[int], place: Place) -> Tensor:
        # with several processes no batches run in parallel threads: every pass through a sharded policy is a
        # collective operation, and threads would start these in a different order on each process
        settings = self.settings if place.world == 1 else replace(self.settings, parallel=OPERATIONS)
        guide = self.unconditional
        seeds = [self.base.seeds[row] for row in drawn]
        text = {name: value[drawn] for name, value in self.base.text.items()}
        total = len(seeds) * len(seeds[0]) * settings.steps
        with (
            tqdm(
                total=total, desc="validation", unit="image step", leave=False, disable=place.rank != 0
            ) as bar,
            guide.sampled(policy, place.device) if guide else nullcontext((policy, None)) as networks,
        ):
            sampled, unconditional = networks
            latents = sample_prompts(self.backbone, sampled, text, seeds, settings, bar.update, unconditional)
        return latents.to(torch.float16).float()

    def _figures(
        self, images: list[Image], mine: list[int], name: str, device: torch.device
    ) -> tuple[dict[str, float], dict[str, Tensor], str | None]:
        """Figures, win-rates by prompt and warning from the images of all processes, identical on each."""
        figures: dict[str, float] = {}
        own: dict[str, dict[int, float]] = {}  # reward -> {prompt: win-rate}, for this process's share
        for group, rewards in {"val": self.rewards, GROUP: self.held_out.rewards}.items():
            for reward in rewards:
                found, own[reward.name] = self._judged(reward, images, mine, device)
                figures |= {f"{group}/{kind}/{reward.name}": value for kind, value in found.items()}
        means = [figures[f"{MONITOR}/{reward.name}"] for reward in self.rewards]
        figures = {MONITOR: float(monitored(torch.tensor(means), self.choice.monitor)), **figures}
        rates = by_prompt(gathered(own))
        held_out = {reward.name: rates.pop(reward.name) for reward in self.held_out.rewards}
        if not held_out:
            return figures, rates, None
        verdict = judge(list(rates.values()), held_out, self.held_out.seed)
        return figures | verdict.figures(), rates, verdict.message(name)

    def _judged(
        self, reward: Reward, images: list[Image], mine: list[int], device: torch.device
    ) -> tuple[dict[str, float], dict[int, float]]:
        """Figures of one reward over all processes, and the win-rates of this process's prompts."""
        per_prompt = len(self.base.seeds[0])
        prompts = [self.base.prompts[row].text for row in mine for _ in range(per_prompt)]
        rate, score, rates = WinRate(), MeanMetric(), {}
        if mine:
            reward.setup(device)  # one reward at a time: beside the policy there may be no room for all
            try:
                scores = reward.score(images, prompts).view(len(mine), per_prompt)
            finally:
                reward.offload()
            base = self.base.base_scores[reward.name][mine]
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

    def state_dict(self) -> dict[str, Any]:
        """The last validated step, which a resumed run does not validate again, and the choice so far."""
        return {"validated": self.validated, "choice": self.choice.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the last validated step and the choice so far."""
        self.validated = state["validated"]
        self.choice.restore(state["choice"])


def told(figures: Mapping[str, float]) -> str:
    """Format the win-rates among a validation's figures: `0.532  (alignment 0.512  looks 0.552)`."""
    rates = "  ".join(
        f"{name.removeprefix(f'{MONITOR}/')} {value:.3f}"
        for name, value in figures.items()
        if name.startswith(f"{MONITOR}/")
    )
    return f"{figures[MONITOR]:.3f}  ({rates})"

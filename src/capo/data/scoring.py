"""The stage that scores a pool: each stored latent is decoded once and judged by every reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch
from PIL.Image import Image
from torch import Tensor, nn

from capo.data.pool import Shard
from capo.data.stages import Order, Report, Stage
from capo.rewards import Reward
from capo.runtime.threads import map_ahead, map_batches, shares_batches

SCORE_BYTES = 64  # upper estimate for one score in parquet


@dataclass(eq=False)
class ScoreStage(Stage):
    """Score stage: decodes each shard once and scores its images by every reward that has not scored them.

    On any device but the CPU, the next batch is decoded in a thread while a batch is scored, and rewards in
    processes of their own score it while those of this process do, one after another; `overlap` decides it
    otherwise. Scores are the same. Where the threads of a CPU take batches of their own
    (`sampling.parallel=batches`), they overlap anyway.
    """

    name = "scores"

    rewards: Sequence[Reward]
    candidates: int
    overlap: bool | None = None

    @property
    def parts(self) -> Sequence[nn.Module | None]:
        return (self.backbone.vae,)

    def setup(self, todo: Sequence[Shard]) -> None:
        for reward in self.rewards:
            reward.setup(self.backbone.device)

    def order(self) -> Order:
        return Order.of(self, self.candidates, [reward.key for reward in self.rewards])

    def close(self) -> None:
        """Move the scorers to the CPU, to free the device's memory."""
        for reward in self.rewards:
            reward.offload()

    def shards(self, row: int) -> list[Shard]:
        return self.pool.row_shards(row, self.candidates)

    def missing(self, row: int) -> list[Shard]:
        return [shard for shard in self.shards(row) if self._unscored(shard)]

    def _unscored(self, shard: Shard) -> list[Reward]:
        return [reward for reward in self.rewards if not self.pool.has_scores(reward.key, shard, self.verify)]

    def run(self, shard: Shard, report: Report) -> None:
        """Decode a shard once and store the scores of the rewards that have not scored it."""
        rewards, width, batch = self._unscored(shard), len(shard.candidates), self.settings.batch
        prompts = [prompt.text for prompt in self.pool.row_prompts(shard.row) for _ in shard.candidates]
        latents = self.pool.read_latents(shard).flatten(0, 1)
        lock, starts = Lock(), range(0, len(latents), batch)

        def decoded(start: int) -> list[Image]:
            return self.backbone.decode(latents[start : start + batch], self.settings.decoded)

        def judged(start: int, images: list[Image], others: ThreadPoolExecutor | None) -> list[Tensor]:
            def scored(reward: Reward) -> Tensor:
                return reward.score(
                    images,
                    prompts[start : start + batch],
                    lambda i: self.pool.place(shard, *divmod(start + i, width)),
                )

            scores = together(rewards, scored, others)
            with lock:
                report(len(images))
            return scores

        settings, device = self.settings, self.backbone.device
        overlap = device.type != "cpu" if self.overlap is None else self.overlap
        if not overlap or shares_batches(settings.parallel, device):
            parts = map_batches(
                lambda start: judged(start, decoded(start), None), starts, settings.parallel, device
            )
        else:
            with ThreadPoolExecutor(max(1, len(rewards))) as others:
                parts = map_ahead(
                    decoded, lambda start, images: judged(start, images, others), starts, device
                )
        for reward, scores in zip(rewards, zip(*parts, strict=True), strict=True):
            self.pool.write_scores(reward.key, shard, torch.cat(scores).view(-1, width), self.record())

    def bytes_missing(self) -> int:
        return SCORE_BYTES * len(self.rewards) * sum(shard.images for shard in self.todo())


def together(
    rewards: Sequence[Reward], scored: Callable[[Reward], Tensor], others: ThreadPoolExecutor | None
) -> list[Tensor]:
    """Return [scored(reward) for each reward]; with `others`, rewards of other processes work in its threads.

    If anything goes wrong, the requests under way are given up, so that no thread waits for an answer.
    """
    if others is None:
        return [scored(reward) for reward in rewards]
    apart = {number: reward for number, reward in enumerate(rewards) if reward.apart}
    try:
        waiting = {number: others.submit(scored, reward) for number, reward in apart.items()}
        own = {number: scored(reward) for number, reward in enumerate(rewards) if number not in apart}
        found = own | {number: future.result() for number, future in waiting.items()}
    except BaseException:
        for reward in apart.values():
            reward.give_up()
        raise
    return [found[number] for number in range(len(rewards))]

"""What training draws its pairs from: the base's own candidates, or an imported pool."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from capo.calibration import Spread, calibrate, spread
from capo.data.dataset import PairDataset
from capo.data.generation import STAGES, ImageGenerator, PoolSpec, fill_pool
from capo.data.importing.chosen import Imported
from capo.data.labels import LabelSource, described
from capo.data.pool import Pool, PoolReader
from capo.data.prompts import Prompt
from capo.data.selection import Selection, select
from capo.errors import InputError
from capo.pairs import Strategy
from capo.rewards import Reward


@dataclass(frozen=True)
class TrainingData:
    """A pool with labels: `candidates` images of each of `prompts`, ordered by `labels`; `described` in one line."""

    pool: Pool
    prompts: Sequence[Prompt]
    candidates: int
    labels: Sequence[LabelSource]
    described: str

    @classmethod
    def sampled(
        cls,
        spec: PoolSpec,
        generator: ImageGenerator,
        rewards: Sequence[Reward],
        stages: Sequence[str] = STAGES,
    ) -> TrainingData:
        """The spec's pool; `stages` of it are completed. Raises as `fill_pool` does."""
        pool = fill_pool(spec, generator, rewards, stages=stages, verify=False)
        return cls(
            pool,
            spec.prompts,
            spec.candidates,
            rewards,
            f"{len(spec.prompts)} prompts x {spec.candidates} candidates of the base, {described(rewards)}",
        )

    @classmethod
    def imported(
        cls, imported: Imported, generator: ImageGenerator, labels: Sequence[LabelSource]
    ) -> TrainingData:
        """An imported pool; scores that `labels` lack are made. Raises as `Imported.ready` does."""
        ready = imported.ready(generator.backbone, generator.settings, labels)
        return cls(ready.pool, ready.prompts, ready.candidates, labels, ready.described(labels))

    def scores(self) -> Tensor:
        """(P, N, L) raw scores."""
        return self.pool.scores(
            [label.key for label in self.labels], self.candidates, self.pool.positions(self.prompts)
        )

    def select(self, strategy: Strategy, calibration: str, seed: int, shared_noise: bool) -> Candidates:
        """The pairs that can be drawn. Raises as `select_candidates` does."""
        return select_candidates(
            self.pool, self.prompts, self.candidates, self.labels, strategy, calibration, seed, shared_noise
        )


@dataclass(frozen=True)
class Candidates:
    """A scored pool, calibrated and selected.

    Attributes:
        dataset: what training draws pairs from.
        spreads: per label source, of its calibrated values; of human choices without the shares of flat and saturated prompts,
            since they are saturated by construction.
        labels: names of the label sources, in the same order.
        scores, calibrated: (P, N, L) raw scores and calibrated rewards.
    """

    dataset: PairDataset
    spreads: list[Spread]
    labels: list[str]
    scores: Tensor
    calibrated: Tensor

    @property
    def selection(self) -> Selection:
        """Winners, losers and gaps."""
        return self.dataset.selection


def select_candidates(
    pool: Pool,
    prompts: Sequence[Prompt],
    candidates: int,
    labels: Sequence[LabelSource],
    strategy: Strategy,
    calibration: str,
    seed: int,
    shared_noise: bool,
) -> Candidates:
    """Raw scores of a complete pool -> calibrated rewards -> pairs.

    Raises InputError for a strategy that does not fit the rewards, an unknown calibration, a score that cannot be used,
    and where no prompt has a pair with dR > 0.
    """
    positions, names = pool.positions(prompts), [label.name for label in labels]
    scores = pool.scores([label.key for label in labels], candidates, positions)
    calibrated = calibrate(scores, [s.link for s in labels], [s.scale for s in labels], calibration, names)
    selection = select(strategy, scores, calibrated)
    if not selection.usable.any():
        raise InputError(
            f"none of {len(prompts)} prompts has a pair with dR > 0: use more candidates (pool.candidates={candidates}), "
            "fewer rewards, or pairs=sum"
        )
    dataset = PairDataset(PoolReader(pool), positions, prompts, selection, seed, shared_noise)
    spreads = [
        found if isinstance(label, Reward) else dataclasses.replace(found, flat=math.nan, saturated=math.nan)
        for label, found in zip(labels, spread(calibrated), strict=True)
    ]
    return Candidates(dataset, spreads, names, scores, calibrated)

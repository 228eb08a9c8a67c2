"""Training data: a pool sampled from the base, or an imported one, and the candidates selected in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capo.data.dataset import PairDataset
from capo.data.generation import STAGES, ImageGenerator, PoolSpec, fill_pool
from capo.data.importing.chosen import Imported
from capo.data.labels import LabelSource, calibrated, described
from capo.data.pool import Pool, PoolReader
from capo.data.pool.import_table import is_imported
from capo.data.prompts import Prompt
from capo.data.selection import Selection, select
from capo.data.spread import Spread, spread
from capo.errors import InputError, ParameterError
from capo.noise import DRAWN, PRIOR
from capo.pairs import Strategy
from capo.rewards import Reward
from capo.runtime.own_code import name_of

NO_PRIOR = f"must be {DRAWN}, since nobody knows from which noise imported images were made"


@dataclass(frozen=True)
class TrainingData:
    """Pool with labels.

    Attributes:
        pool: the pool, with scores of all `labels`.
        prompts: the prompts of the pool to train on.
        candidates: number of images per prompt.
        labels: label sources (rewards or human choices) that order the images of a prompt.
        described: one line about the data, for summaries.
    """

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
        drawn_by: str = "the base",
    ) -> TrainingData:
        """Complete `stages` of the spec's pool and return it as training data; errors as in `fill_pool`.

        `drawn_by` says of which model `generator` draws the candidates.
        """
        pool = fill_pool(spec, generator, rewards, stages=stages, verify=False)
        return cls(
            pool,
            spec.prompts,
            spec.candidates,
            rewards,
            f"{len(spec.prompts)} prompts x {spec.candidates} candidates of {drawn_by}, {described(rewards)}",
        )

    @classmethod
    def imported(
        cls, imported: Imported, generator: ImageGenerator, labels: Sequence[LabelSource]
    ) -> TrainingData:
        """Compute missing scores of an imported pool and return it; errors as in `Imported.ready`."""
        ready = imported.ready(generator.backbone, generator.settings, labels, generator.engine)
        return cls(ready.pool, ready.prompts, ready.candidates, labels, ready.described(labels))

    def scores(self) -> Tensor:
        """Raw scores (P, N, L): prompts, candidates, label sources."""
        return self.pool.scores(
            [label.key for label in self.labels], self.candidates, self.pool.positions(self.prompts)
        )

    def select(
        self, strategy: Strategy, calibration: str, seed: int, shared_noise: bool, **options: Any
    ) -> Candidates:
        """Calibrate the scores and select the pairs that can be drawn; see `select_candidates`."""
        return select_candidates(
            self.pool,
            self.prompts,
            self.candidates,
            self.labels,
            strategy,
            calibration,
            seed,
            shared_noise,
            **options,
        )


@dataclass(frozen=True)
class Candidates:
    """Candidates of a pool after calibration and pair selection.

    Attributes:
        dataset: dataset of the selected pairs.
        spreads: spread of the calibrated rewards of each label source. If a source is not graded, the shares
            of flat and saturated prompts are NaN, since ranks are saturated by construction.
        labels: names of the label sources, in the order of `spreads`.
        scores: (P, N, L) raw scores.
        calibrated: (P, N, L) calibrated rewards.
    """

    dataset: PairDataset
    spreads: list[Spread]
    labels: list[str]
    scores: Tensor
    calibrated: Tensor

    @property
    def selection(self) -> Selection:
        """Masks of winners and losers, combined rewards and pair counts."""
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
    group: int = 2,
    source: str = DRAWN,
    swap: bool = False,
) -> Candidates:
    """Calibrate the raw scores of a complete pool and select pairs.

    Args:
        pool: complete pool with scores of all `labels`.
        prompts: P prompts of the pool.
        candidates: number of candidates per prompt, N; the first ones count.
        labels: L label sources.
        strategy: a function of `capo.pairs`.
        calibration: a key of `capo.calibration.METHODS`.
        seed: seed of the dataset's draws.
        shared_noise: whether winner and loser share their noise.
        group: number of candidates of a prompt in a visit (`PairDataset`).
        source: one of `capo.noise.SOURCES`; `prior` gives each candidate the noise that it was sampled from.
        swap: whether winner and loser are exchanged in each visit (`PairDataset`).

    Raises:
        InputError: if an imported pool is asked for prior noise, the strategy does not fit the rewards, the
            calibration is unknown, a score is missing or invalid, no prompt has a pair with dR > 0, or the
            prompts have fewer candidates than a group.
    """
    if source == PRIOR and is_imported(pool.folder):
        raise ParameterError("source", source, NO_PRIOR)
    positions = pool.positions(prompts)
    scores = pool.scores([label.key for label in labels], candidates, positions)
    rewards = calibrated(scores, labels, calibration)
    selection = select(strategy, scores, rewards)
    if not selection.usable.any():
        raise InputError(
            f"none of {len(prompts)} prompts has a pair with dR > 0 by the pairs strategy "
            f"{name_of(strategy)}: {_remedy(scores, labels, candidates)}"
        )
    prior = pool.manifest.seed if source == PRIOR else None
    dataset = PairDataset(
        PoolReader(pool),
        positions,
        prompts,
        selection,
        seed,
        shared_noise,
        group=group,
        prior_seed=prior,
        swap=swap,
    )
    names = [label.name for label in labels]
    return Candidates(dataset, _spreads(labels, rewards), names, scores, rewards)


def _remedy(scores: Tensor, labels: Sequence[LabelSource], candidates: int) -> str:
    """Advice for scores (P, N, L) of which no pair comes: the labels that order no candidates come first."""
    constant = (scores == scores[:, :1]).flatten(0, 1).all(0).tolist()
    if alike := [label.name for label, same in zip(labels, constant, strict=True) if same]:
        return f"{', '.join(alike)} scores all candidates of a prompt alike; correct it, or leave it out"
    return f"use more candidates (pool.candidates={candidates}), fewer rewards, or pairs=sum"


def _spreads(labels: Sequence[LabelSource], rewards: Tensor) -> list[Spread]:
    """Spread of each label source; those that are not graded have no shares of flat or saturated prompts."""
    return [
        found if label.graded else dataclasses.replace(found, flat=math.nan, saturated=math.nan)
        for label, found in zip(labels, spread(rewards), strict=True)
    ]

"""Imported pool as training data: its usable prompts, missing scores, and its description in summaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
from capo.data.engines import Engine
from capo.data.generation import check_space
from capo.data.labels import LabelSource, described, scored
from capo.data.pool import Pool
from capo.data.pool.import_table import (
    HUMAN_LABELS,
    ImportTable,
    check_entries,
    is_imported,
    read_import_table,
)
from capo.data.prompts import Prompt, prompt_id
from capo.data.scoring import ScoreStage
from capo.errors import InputError


@dataclass(frozen=True)
class Imported:
    """Imported pool without the entries whose caption is a validation or test prompt.

    Attributes:
        pool: the pool.
        table: origin of its images, and the choices.
        prompts: entries that training may use.
        held_out: number of entries left out.
    """

    pool: Pool
    table: ImportTable
    prompts: Sequence[Prompt]
    held_out: int

    @classmethod
    def open(cls, folder: str | Path, labels: str, held_out: Sequence[Prompt]) -> Imported:
        """Open the imported pool in `folder`, reading only its prompts and its table.

        Args:
            folder: folder of the pool.
            labels: `human` or `rewards`.
            held_out: validation and test prompts.

        Raises:
            InputError: if the folder is not a pool or holds a sampled one, if `labels` is `human` but the
                pool has no choices, or if no entry is left.
        """
        if not is_imported(Path(folder)):
            inner = [str(place) for place in sorted(Path(folder).glob("*")) if is_imported(place)]
            made = "give the folder that generate.py stage=import printed"
            raise InputError(
                f"pool.imported={folder}: it is no imported pool; "
                + (f"there are {', '.join(inner)}: give one of them" if inner else made)
            )
        pool, table = Pool.open(folder), read_import_table(Path(folder))
        if labels == HUMAN_LABELS and table.ranks is None:
            raise InputError(
                f"pool.labels=human: {folder} has no human choices; set pool.labels=rewards, or import the "
                "images with a column of scores (import.score)"
            )
        entries = [prompt for prompt, _ in pool.prompts]
        check_entries(Path(folder), table, entries)
        taken = {prompt.id for prompt in held_out}
        prompts = [prompt for prompt in entries if prompt_id(prompt.text) not in taken]
        if not prompts:
            raise InputError(
                f"pool.imported={folder}: all of its {len(entries)} captions are validation or test "
                "prompts; give other validation and test prompts, or another pool"
            )
        return cls(pool, table, prompts, len(entries) - len(prompts))

    @property
    def candidates(self) -> int:
        """Number of images per prompt."""
        return self.table.candidates

    def described(self, labels: Sequence[LabelSource]) -> str:
        """Description in one line, for summaries and model cards."""
        left_out = (
            f"; {self.held_out} left out, whose captions are validation or test prompts"
            if self.held_out
            else ""
        )
        return (
            f"{len(self.prompts)} imported entries of {self.candidates} images ({self.pool.folder.name}), "
            f"{described(labels)}{left_out}"
        )

    def ready(
        self, backbone: Backbone, settings: SamplerSettings, labels: Sequence[LabelSource], engine: Engine
    ) -> Imported:
        """Compute missing scores of the rewards in `labels`; human choices were stored at import.

        Raises InputError as `check` does, and if the disk has too little space.
        """
        self.check(backbone, settings)
        if rewards := scored(labels):
            stage = ScoreStage(
                self.pool, self.pool.text_shards(), backbone, settings, False, rewards, self.candidates
            )
            check_space(self.pool, [stage])
            engine.run([stage])
        return self

    def check(self, backbone: Backbone, settings: SamplerSettings) -> None:
        """Raise InputError for a pool that this model cannot be trained on.

        It was made with another latent space or other text encoders than the model's, or is incomplete.
        """
        mine, its = backbone.fingerprints, dataclasses.asdict(self.pool.manifest)
        if wrong := [part for part in ("latent_space", "text_encoders") if mine[part] != its[part]]:
            raise InputError(
                f"pool.imported={self.pool.folder}: its {' and '.join(wrong)} are not those of "
                f"{backbone.name}; train the model that it was imported with (model=), or import the images "
                "with this one (generate.py stage=import)"
            )
        self.pool.check_latent_shape(backbone.latent_shape)
        lacking = [
            shard.name
            for shard in self.pool.shards(self.candidates)
            if not (
                self.pool.has_text(shard.row, rounded=settings.text_dtype) and self.pool.has_latents(shard)
            )
        ]
        if lacking or len(self.pool.prompts) != len(self.table.ids):
            raise InputError(
                f"pool.imported={self.pool.folder} is incomplete ({len(lacking)} shards are missing): run "
                "the same generate.py stage=import again, with sampling.precision and trainer.precision of "
                "this run, for which text may have to be encoded anew; it resumes where it stopped"
            )

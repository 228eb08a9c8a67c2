"""An imported pool as training sees it: its prompts, who orders its images, what it is called in summaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
from capo.data.generation import check_space, run_stage
from capo.data.labels import LabelSource, described, scored
from capo.data.pool import Pool
from capo.data.pool.import_table import HUMAN_LABELS, ImportTable, read_import_table
from capo.data.prompts import Prompt, prompt_id
from capo.data.stages import ScoreStage
from capo.errors import InputError


@dataclass(frozen=True)
class Imported:
    """An imported pool, less the entries whose caption is a prompt of validation or test.

    Attributes:
        pool, table: where it lies, and what it was made from.
        prompts: its entries that training may use.
        held_out: number of those that it may not.
    """

    pool: Pool
    table: ImportTable
    prompts: Sequence[Prompt]
    held_out: int

    @classmethod
    def open(cls, folder: str | Path, labels: str, held_out: Sequence[Prompt]) -> Imported:
        """The pool in `folder`. Nothing but its prompts is read.

        Raises InputError for a folder that is none or holds a sampled pool, for `labels=human` where nobody chose, and where no
        entry is left.
        """
        pool, table = Pool.open(folder), read_import_table(Path(folder))
        if labels == HUMAN_LABELS and table.ranks is None:
            raise InputError(
                f"pool.labels=human: nobody has judged the images of {folder}; say pool.labels=rewards, or import them with "
                "the column of their scores (import.score)"
            )
        taken = {prompt.id for prompt in held_out}
        prompts = [prompt for prompt, _ in pool.prompts if prompt_id(prompt.text) not in taken]
        if not prompts:
            raise InputError(
                f"pool.imported={folder}: all of its {len(pool.prompts)} captions are validation or test prompts; give others"
            )
        return cls(pool, table, prompts, len(pool.prompts) - len(prompts))

    @property
    def candidates(self) -> int:
        """Images a prompt."""
        return self.table.candidates

    def described(self, labels: Sequence[LabelSource]) -> str:
        """One line for summaries and model cards."""
        left_out = (
            f"; {self.held_out} left out, whose captions are validation or test prompts"
            if self.held_out
            else ""
        )
        return f"{len(self.prompts)} imported entries of {self.candidates} images ({self.pool.folder.name}), {described(labels)}{left_out}"

    def ready(
        self,
        backbone: Backbone,
        settings: SamplerSettings,
        labels: Sequence[LabelSource],
        progress: bool = True,
    ) -> Imported:
        """Makes the scores that `labels` lack; human choices were stored when the pool was imported.

        Raises InputError where the pool was made with other latents or text encoders than the model's, or is not complete.
        """
        mine, its = backbone.fingerprints, dataclasses.asdict(self.pool.manifest)
        if wrong := [part for part in ("latent_space", "text_encoders") if mine[part] != its[part]]:
            raise InputError(
                f"pool.imported={self.pool.folder}: its {' and '.join(wrong)} are not those of {backbone.name}; import the "
                "images with this model (generate.py stage=import)"
            )
        self.pool.check_latent_shape(backbone.latent_shape)
        self._check_complete()
        if rewards := scored(labels):
            stage = ScoreStage(
                self.pool, self.pool.text_shards(), backbone, settings, False, rewards, self.candidates
            )
            check_space(self.pool, [stage])
            run_stage(stage, progress)
        return self

    def _check_complete(self) -> None:
        lacking = [
            shard.name
            for shard in self.pool.shards(self.candidates)
            if not (self.pool.has_text(shard.row) and self.pool.has_latents(shard))
        ]
        if lacking or len(self.pool.prompts) != len(self.table.ids):
            raise InputError(
                f"pool.imported={self.pool.folder} is not complete ({len(lacking)} shards are missing): run the generate.py "
                "stage=import that made it again; it goes on where it stopped"
            )

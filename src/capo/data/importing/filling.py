"""Filling an imported pool with text, latents and human choices, shard by shard, skipping existing shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
from capo.data.engines import run_stage
from capo.data.generation import check_space
from capo.data.importing.images import BrokenImage, picture, pixels
from capo.data.importing.source import Source
from capo.data.importing.survey import survey
from capo.data.labels import HUMAN
from capo.data.pool import Manifest, Pool, Shard, pool_name
from capo.data.pool.import_table import (
    ImportTable,
    check_entries,
    is_imported,
    read_import_table,
    write_import_table,
)
from capo.data.prompts import Prompt
from capo.data.stages import LatentFiles, Report, Stage, TextStage
from capo.errors import InputError
from capo.runtime.names import check_name

SPLIT = "imported"


def image_size(backbone: Backbone) -> tuple[int, int]:
    """Size (width, height) in pixels of the images that the model's latents decode to."""
    factor = 2 ** (len(backbone.vae.config.block_out_channels) - 1)
    _, height, width = backbone.latent_shape
    return width * factor, height * factor


@dataclass(eq=False)
class EncodeStage(LatentFiles):
    """Encoding stage: images -> latents by the VAE, as the mode of the posterior, so without randomness.

    Batches stay within a shard.
    """

    source: Source
    table: ImportTable

    @property
    def parts(self) -> Sequence[nn.Module | None]:
        return (self.backbone.vae,)

    def run(self, shard: Shard, report: Report) -> None:
        """Read, crop and encode the images of a shard. Raises InputError for one that became unreadable."""
        places = self.table.places[
            shard.positions.start : shard.positions.stop, shard.candidates.start : shard.candidates.stop
        ]
        flat = [tuple(place) for place in places.reshape(-1, 3).tolist()]
        parts = []
        for start in range(0, len(flat), self.settings.batch):
            images = [self._picture(place) for place in flat[start : start + self.settings.batch]]
            parts.append(self.backbone.encode_images(pixels(images)).cpu())
            report(len(images))
        latents = torch.cat(parts).unflatten(0, places.shape[:2])
        self.pool.write_latents(shard, latents, self.record() | {"pillow": version("pillow")})

    def _picture(self, place: tuple[int, int, int]):
        try:
            return picture(self.source.cell(place), self.source.images, image_size(self.backbone))
        except BrokenImage as error:
            raise InputError(
                f"{self.source.where(place)} could be read at first and now cannot ({error}); restore it"
            ) from error


@dataclass(eq=False)
class ChoiceStage(Stage):
    """Choice stage: human choices, stored as scores of `HUMAN`, which are ranks, 0 the worst."""

    name = "choices"

    table: ImportTable

    def shards(self, row: int) -> list[Shard]:
        return [] if self.table.ranks is None else self.pool.row_shards(row, self.table.candidates)

    def missing(self, row: int) -> list[Shard]:
        return [
            shard for shard in self.shards(row) if not self.pool.has_scores(HUMAN.key, shard, self.verify)
        ]

    def run(self, shard: Shard, report: Report) -> None:
        assert self.table.ranks is not None  # else nothing was missing
        ranks = self.table.ranks[
            shard.positions.start : shard.positions.stop, shard.candidates.start : shard.candidates.stop
        ]
        self.pool.write_scores(HUMAN.key, shard, torch.from_numpy(ranks.copy()), {})
        report(shard.images)

    def bytes_missing(self) -> int:
        return 0  # negligible: a thousandth of the latents


def _stages(
    pool: Pool, backbone: Backbone, settings: SamplerSettings, source: Source, table: ImportTable
) -> list[Stage]:
    rows = pool.text_shards()
    return [
        TextStage(pool, rows, backbone, settings, True),
        EncodeStage(pool, rows, backbone, settings, True, table.candidates, source, table),
        ChoiceStage(pool, rows, backbone, settings, True, table),
    ]


def import_pool(
    source: Source,
    backbone: Backbone,
    settings: SamplerSettings,
    root: Path,
    model: str,
    *,
    prompts_per_shard: int = 8,
    progress: bool = True,
) -> Pool:
    """Import a source into a pool under `root`: create the pool, or complete an existing one.

    In the manifest, the generator is the fingerprint of the source's content and the seed is 0, since nothing
    is random.

    Args:
        source: tables and images.
        backbone: model whose VAE and text encoders are used.
        settings: batch size and precision.
        root: folder of all pools.
        model: name of the model, part of the folder's name.
        prompts_per_shard: prompts in a row of the pool.
        progress: whether to show progress bars.

    Returns:
        The complete pool.

    Raises:
        InputError: if `model` cannot be part of a folder's name, if no entry can be imported, if the disk has
            too little space, or if the existing pool was made with another model's latent space or text
            encoders.
    """
    check_name("model", model)
    parts = backbone.fingerprints
    manifest = Manifest(
        prompts_per_shard=prompts_per_shard,
        seed=0,
        generator=source.fingerprint,
        latent_space=parts["latent_space"],
        text_encoders=parts["text_encoders"],
    )
    folder = Path(root) / pool_name(model, manifest.generator, 0, SPLIT)
    table = None if is_imported(folder) else survey(source, progress)
    pool = Pool.create(folder, manifest)
    if table is not None:
        with pool.lock("imported", wait=True):
            write_import_table(folder, table)
    table = read_import_table(folder)
    pool.append_prompts([Prompt(*pair) for pair in zip(table.ids, table.texts, strict=True)], SPLIT)
    check_entries(folder, table, [prompt for prompt, _ in pool.prompts])
    pool.check_latent_shape(backbone.latent_shape)
    stages = _stages(pool, backbone, settings, source, table)
    check_space(pool, stages)
    for stage in stages:
        run_stage(stage, progress)
    return pool

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
from capo.data.engines import Engine, LocalEngine
from capo.data.generation import check_space
from capo.data.importing.images import BrokenImage, picture, pixels
from capo.data.importing.ordering import Place
from capo.data.importing.source import Source
from capo.data.importing.survey import survey
from capo.data.importing.tables import SHARED
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
from capo.data.stages import LatentFiles, Order, Report, Stage, TextStage
from capo.errors import InputError
from capo.runtime.names import check_name

SPLIT = "imported"


def image_size(backbone: Backbone) -> tuple[int, int]:
    """Size (width, height) in pixels of the images that the model's latents decode to."""
    factor = 2 ** (len(backbone.vae.config.block_out_channels) - 1)
    _, height, width = backbone.latent_shape
    return width * factor, height * factor


@dataclass(frozen=True)
class EncodeOrder(Order):
    """Order of an `EncodeStage`, with the source of its images."""

    source: Source


@dataclass(eq=False)
class EncodeStage(LatentFiles):
    """Encoding stage: images -> latents by the VAE, as the mode of the posterior, so without randomness.

    Batches stay within a shard. With `away`, it runs in another process than the one that looked through the
    source, perhaps on a machine that does not see its files.
    """

    source: Source
    table: ImportTable
    away: bool = False

    @property
    def parts(self) -> Sequence[nn.Module | None]:
        return (self.backbone.vae,)

    def order(self) -> EncodeOrder:
        return EncodeOrder(**vars(Order.of(self, self.candidates)), source=self.source)

    def setup(self, todo: Sequence[Shard]) -> None:
        """Raise InputError if the stage is `away` and does not see the tables, or the images of `todo`."""
        if self.away:
            self.source.check_here(place for shard in todo for place in self._places(shard))

    def _places(self, shard: Shard) -> list[Place]:
        places = self.table.places[
            shard.positions.start : shard.positions.stop, shard.candidates.start : shard.candidates.stop
        ]
        return [(table, row, item) for table, row, item in places.reshape(-1, 3).tolist()]

    def run(self, shard: Shard, report: Report) -> None:
        """Read, crop and encode the images of a shard. Raises InputError for one that became unreadable."""
        flat = self._places(shard)
        parts = []
        for start in range(0, len(flat), self.settings.batch):
            images = [self._picture(place) for place in flat[start : start + self.settings.batch]]
            parts.append(self.backbone.encode_images(pixels(images)).cpu())
            report(len(images))
        latents = torch.cat(parts).unflatten(0, (len(shard.positions), len(shard.candidates)))
        self.pool.write_latents(shard, latents, self.record() | {"pillow": version("pillow")})

    def _picture(self, place: Place):
        try:
            return picture(self.source.cell(place), self.source.images, image_size(self.backbone))
        except BrokenImage as error:
            remedy = f"restore it, or {SHARED}" if self.away else "restore it"
            raise InputError(
                f"{self.source.where(place)} could be read at first and now cannot ({error}); {remedy}"
            ) from error


def ordered_stage(
    order: EncodeOrder, pool: Pool, backbone: Backbone, settings: SamplerSettings
) -> EncodeStage:
    """Build the stage of an order in the process that runs it."""
    table = read_import_table(pool.folder)
    return EncodeStage(
        pool, (), backbone, settings, order.verify, order.candidates, order.source, table, True
    )


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
    engine: Engine | None = None,
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
        engine: what encodes captions and images; None: this process.

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
    (engine or LocalEngine()).run(stages, progress)
    return pool

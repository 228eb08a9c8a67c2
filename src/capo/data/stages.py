"""Stages that fill a pool (text, latents; scores in `scoring.py`), each with an idempotent `run(shard)`."""

from __future__ import annotations

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from capo.backbones import Backbone
from capo.backbones.family import Text
from capo.backbones.sampling import SamplerSettings, encode_unconditional, sample_prompts
from capo.data.pool import Manifest, Pool, Shard
from capo.data.prompts import candidate_seed
from capo.runtime.threads import BATCHES

Report = Callable[[int], object]  # called with the number of images (or prompts) finished since the last call
TEXT_BATCH = 64  # prompts per batch of the text encoders
log = logging.getLogger(__name__)
RECORDED = ("torch", "diffusers", "transformers")


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries whose releases can round differently."""
    return {library: version(library) for library in RECORDED}


def model_of(device: torch.device) -> str:
    """Name of a GPU's model, else the device's kind: which of several it is makes no difference."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sampling_record(backbone: Backbone, settings: SamplerSettings) -> dict[str, object]:
    """Settings that change results by rounding only; results are bitwise equal if these are equal."""
    threads = 1 if settings.parallel == BATCHES else torch.get_num_threads()
    batch = backbone.sampling_fits.at_most(settings.batch)
    return {"batch": batch, "threads": threads, "device": model_of(backbone.device), **library_versions()}


@dataclass(frozen=True)
class Order:
    """What another process needs to know of a stage, besides the configuration.

    Attributes:
        stage: its name.
        folder: folder of the pool, absolute.
        manifest: the manifest that the pool there must have.
        candidates: number of candidates; 0 for text.
        rewards: keys of the rewards that score.
        verify: whether checksums of existing files are compared.
    """

    stage: str
    folder: Path
    manifest: Manifest
    candidates: int
    rewards: tuple[str, ...]
    verify: bool

    @classmethod
    def of(cls, stage: Stage, candidates: int = 0, rewards: Sequence[str] = ()) -> Order:
        """Describe a stage."""
        folder, manifest = stage.pool.folder.absolute(), stage.pool.manifest
        return cls(stage.name, folder, manifest, candidates, tuple(rewards), stage.verify)


@dataclass(eq=False)
class Stage(ABC):
    """One kind of work on the given rows of a pool.

    With `verify`, `missing` compares the checksums of existing files.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "image"

    pool: Pool
    rows: Sequence[int]
    backbone: Backbone
    settings: SamplerSettings
    verify: bool

    @abstractmethod
    def shards(self, row: int) -> list[Shard]:
        """Shards of a row, made or not."""

    @abstractmethod
    def missing(self, row: int) -> list[Shard]:
        """Missing shards of a row, in the order in which they must be made."""

    @abstractmethod
    def run(self, shard: Shard, report: Report) -> None:
        """Make a shard. The caller holds the pool's lock of this stage and row."""

    def make(self, shard: Shard, report: Report, wait: bool = False) -> bool | None:
        """Run `shard` under its lock if it is missing, and return whether it was.

        Returns None if another process holds the lock; with `wait` its end is waited for.
        """
        with self.pool.lock(self.name, shard.row, wait) as mine:
            if not mine:
                return None
            if missing := shard in self.missing(shard.row):
                self.run(shard, report)
            return missing

    @abstractmethod
    def bytes_missing(self) -> int:
        """Estimated size in bytes of all missing shards."""

    @property
    def parts(self) -> Sequence[nn.Module | None]:
        """Networks that are on the device while the stage runs, and on the CPU before and after."""
        return ()

    def setup(self, todo: Sequence[Shard]) -> None:  # noqa: B027 - many stages load nothing
        """Load models that the stage needs to make shards such as `todo`; called before the first `run`."""

    def order(self) -> Order | None:
        """Description from which another process builds this stage; None if only this one can run it."""
        return None

    def close(self) -> None:  # noqa: B027 - nor release anything
        """Release models and log a summary; called after the last `run`."""

    def todo(self) -> list[Shard]:
        """Missing shards of all rows."""
        return [shard for row in self.rows for shard in self.missing(row)]

    def amount(self, shard: Shard) -> int:
        """Units of progress (`unit`) in a shard."""
        return shard.images

    def record(self) -> dict[str, object]:
        """Settings for the header of a file, which record how it was made."""
        return sampling_record(self.backbone, self.settings)


@dataclass(eq=False)
class TextStage(Stage):
    """Text stage: encodes the prompts of each row."""

    name, unit = "text", "prompt"

    def __post_init__(self):
        self._encoded, self._cut = 0, Counter()

    @property
    def parts(self) -> Sequence[nn.Module | None]:
        return self.backbone.text_encoders

    def order(self) -> Order:
        return Order.of(self)

    def shards(self, row: int) -> list[Shard]:
        return [self.pool.text_shard(row)]

    def missing(self, row: int) -> list[Shard]:
        there = self.pool.has_text(row, self.verify, self.settings.text_dtype)
        return [] if there else self.shards(row)

    def amount(self, shard: Shard) -> int:
        return len(shard.positions)

    def run(self, shard: Shard, report: Report) -> None:
        """Encode the prompts of a row."""
        prompts = [prompt.text for prompt in self.pool.row_prompts(shard.row)]
        parts = [
            self.backbone.encode_prompts(prompts[start : start + TEXT_BATCH])
            for start in range(0, len(prompts), TEXT_BATCH)
        ]
        text = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        kept = self._rounded(text)
        changed = any(kept[name].dtype != value.dtype for name, value in text.items())
        self.pool.write_text(shard.row, kept, self.record(), self.settings.text_dtype if changed else None)
        self._encoded += len(prompts)
        self._cut.update(self.backbone.truncated(prompts))
        report(len(prompts))

    def _rounded(self, text: Text) -> dict[str, Tensor]:
        """Embeddings in the dtype that the denoiser's autocast would round them to, in half the space."""
        dtype = self.settings.text_dtype
        names = self.backbone.projected_text if dtype else ()
        return {
            name: value.to(dtype) if name in names and value.dtype == torch.float32 else value
            for name, value in text.items()
        }

    def close(self) -> None:
        """Warn about prompts with more tokens than the text encoders read."""
        for component, count in self._cut.items():
            if count:
                log.warning(
                    "%d of %d prompts are longer than the %d tokens that %s reads: what comes after them "
                    "has no effect on the image",
                    count,
                    self._encoded,
                    self.backbone.token_limits[component],
                    component,
                )

    def bytes_missing(self) -> int:
        todo = self.todo()
        if not todo:
            return 0
        with self.backbone.visiting("cpu"):  # for one prompt, moving the encoders would take longer
            one = self.backbone.encode_prompts([self.pool.row_prompts(todo[0].row)[0].text])
        return sum(tensor.nbytes for tensor in self._rounded(one).values()) * sum(map(self.amount, todo))


@dataclass(eq=False)
class LatentFiles(Stage):
    """What stages that make latents share, drawn or encoded: which shards lack them, and their size."""

    name = "latents"

    candidates: int

    def shards(self, row: int) -> list[Shard]:
        return self.pool.row_shards(row, self.candidates)

    def missing(self, row: int) -> list[Shard]:
        return [shard for shard in self.shards(row) if not self.pool.has_latents(shard, self.verify)]

    def bytes_missing(self) -> int:
        return 2 * math.prod(self.backbone.latent_shape) * sum(shard.images for shard in self.todo())


@dataclass(eq=False)
class LatentStage(LatentFiles):
    """Latent stage: samples the candidates of each shard.

    Batches stay within a shard, and the text embeddings are those stored in the pool, as in training.
    """

    denoiser: nn.Module
    unconditional: nn.Module | None = None

    @property
    def parts(self) -> Sequence[nn.Module | None]:
        return self.denoiser, self.unconditional

    def setup(self, todo: Sequence[Shard]) -> None:
        """Encode the negative branch, so that text encoders and denoiser are not on the device together."""
        encode_unconditional(self.backbone, self.settings, [shard.images for shard in todo])

    def order(self) -> Order:
        return Order.of(self, self.candidates)

    def run(self, shard: Shard, report: Report) -> None:
        """Draw the latents of a shard, each candidate from its own seed."""
        seed = self.pool.manifest.seed
        seeds = [
            [candidate_seed(seed, prompt.id, candidate) for candidate in shard.candidates]
            for prompt in self.pool.row_prompts(shard.row)
        ]
        progress = _ImageCount(shard.images, self.settings.steps, report)
        latents = sample_prompts(
            self.backbone,
            self.denoiser,
            self.pool.read_text(shard.row),
            seeds,
            self.settings,
            progress,
            self.unconditional,
        )
        if not latents.isfinite().all():
            self.backbone.check_weights(self.denoiser)
        self.pool.write_latents(shard, latents, self.record())
        progress.finish()


class _ImageCount:
    """Converts counts of images that took a denoising step into whole images, for progress within a batch."""

    def __init__(self, images: int, steps: int, report: Report):
        self.images, self.steps, self.report = images, steps, report
        self.taken = self.shown = 0

    def __call__(self, images: int) -> None:
        self.taken += images
        self._show(min(self.taken // self.steps, self.images))

    def finish(self) -> None:
        self._show(self.images)

    def _show(self, images: int) -> None:
        self.report(images - self.shown)
        self.shown = images

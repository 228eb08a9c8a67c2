"""Fill a pool with text, latents and scores, shard by shard; what is there is skipped."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn
from tqdm import tqdm

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
from capo.data.pool import Manifest, Pool, Shard, pool_name
from capo.data.prompts import Prompt
from capo.data.stages import LatentStage, ScoreStage, Stage, TextStage
from capo.errors import InputError
from capo.rewards import Reward
from capo.runtime.fingerprints import content_fingerprint

WAIT = 0.5  # seconds until shards that another process works on are looked at again
COMMANDS = {
    "text": "text",
    "latents": "latents",
    "scores": "score",
}  # stage -> what generate.py calls it: stage=...
STAGES = tuple(COMMANDS)


def generator_fingerprint(backbone: Backbone, denoiser_fingerprint: str, settings: SamplerSettings) -> str:
    """64 hex digits over what decides a latent beside prompt and seed: denoiser, sampler, steps, guidance.

    The batch is left out: it moves a latent by rounding only, and stands in each shard's header.
    """
    known = {
        "denoiser": denoiser_fingerprint,
        "sampler": backbone.sampler_identity(),
        "steps": settings.steps,
        "guidance": settings.guidance,
    }
    return content_fingerprint(
        known if settings.precision == "32-true" else known | {"precision": settings.precision}
    )


@dataclass(frozen=True)
class ImageGenerator:
    """What draws a pool's images: a backbone's pipeline with `denoiser`, base or policy, in it."""

    backbone: Backbone
    denoiser: nn.Module
    denoiser_fingerprint: str
    settings: SamplerSettings

    @classmethod
    def base(cls, backbone: Backbone, settings: SamplerSettings) -> "ImageGenerator":
        """The frozen base itself."""
        return cls(backbone, backbone.denoiser, backbone.fingerprints["denoiser"], settings)

    @cached_property
    def fingerprint(self) -> str:
        """`generator_fingerprint` of this one."""
        return generator_fingerprint(self.backbone, self.denoiser_fingerprint, self.settings)


@dataclass(frozen=True)
class PoolSpec:
    """What a pool shall hold, and where: `candidates` images of each of `prompts`, under `root`.

    `model` and `split` are for the folder's name; `seed` is that of the images. Raises InputError for no
    prompts and for fewer than two candidates, which cannot be compared.
    """

    root: Path
    model: str
    split: str
    seed: int
    prompts: Sequence[Prompt]
    candidates: int
    prompts_per_shard: int = 8

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise InputError(
                f"pool of split '{self.split}': {self.candidates} candidates a prompt; "
                "fewer than 2 cannot be compared (pool.candidates, or images a prompt)"
            )
        if self.prompts_per_shard < 1:
            raise InputError(f"pool.prompts_per_shard={self.prompts_per_shard} must be at least 1")
        if not self.prompts:
            raise InputError(f"pool of split '{self.split}': its prompt set is empty")


def open_pool(spec: PoolSpec, generator: ImageGenerator) -> Pool:
    """The spec's pool, created if need be, with all of the spec's prompts in it; nothing is sampled.

    Raises InputError for a pool there that was made otherwise, and a root that cannot be written.
    """
    fingerprints = generator.backbone.fingerprints
    manifest = Manifest(
        prompts_per_shard=spec.prompts_per_shard,
        seed=spec.seed,
        generator=generator.fingerprint,
        latent_space=fingerprints["latent_space"],
        text_encoders=fingerprints["text_encoders"],
    )
    folder = Path(spec.root) / pool_name(spec.model, manifest.generator, spec.seed, spec.split)
    pool = Pool.create(folder, manifest)
    pool.append_prompts(spec.prompts, spec.split)
    pool.check_latent_shape(generator.backbone.latent_shape)
    return pool


def fill_pool(
    spec: PoolSpec,
    generator: ImageGenerator,
    rewards: Sequence[Reward] = (),
    *,
    stages: Sequence[str] = STAGES,
    progress: bool = True,
    verify: bool = True,
) -> Pool:
    """Makes what is missing of the spec's pool: the rows of its prompts, that many candidates, all `rewards`.

    Any number of processes may do so at once. Rows are filled whole, so prompts of an earlier spec that share
    a row are filled with them. With `verify` the checksum of everything that is there is compared, and
    damaged shards are made again; without it only headers and sizes are looked at. Raises InputError for a
    stage that needs an earlier one left out of `stages`, for too little disk space (before any work), and for
    a latent or score that is not finite.
    """
    if unknown := set(stages) - set(STAGES):
        raise InputError(f"stage {', '.join(sorted(unknown))} is unknown; choose from {', '.join(STAGES)}")
    pool = open_pool(spec, generator)
    work = stages_of(pool, spec, generator, rewards, verify)
    wanted = [stage for stage in work if stage.name in stages]
    check_space(pool, wanted)
    for stage in work[: work.index(wanted[-1]) + 1] if wanted else ():
        if stage in wanted:
            run_stage(stage, progress)
        elif stage.todo():
            raise InputError(
                f"{lacking(stage)}, which {wanted[-1].name} needs: run generate.py stage={COMMANDS[stage.name]} first"
            )
    return pool


def lacking(stage: Stage) -> str:
    """What a stage has still to make, for messages."""
    return f"pool {stage.pool.folder}: {len(stage.todo())} shards lack their {stage.name}"


def stages_of(
    pool: Pool, spec: PoolSpec, generator: ImageGenerator, rewards: Sequence[Reward], verify: bool
) -> list[Stage]:
    """What fills a pool, in its order; with `verify`, checksums of what is there are compared."""
    rows = pool.text_shards(pool.positions(spec.prompts))
    backbone, settings = generator.backbone, generator.settings
    return [
        TextStage(pool, rows, backbone, settings, verify),
        LatentStage(pool, rows, backbone, settings, verify, generator.denoiser, spec.candidates),
        ScoreStage(pool, rows, backbone, settings, verify, rewards, spec.candidates),
    ]


def run_stage(stage: Stage, progress: bool = True) -> None:
    """The engine of one process: runs a stage's shards one after another until none is missing.

    Shards that another process works on are passed over and looked at again, in case that process dies.
    """
    todo = stage.todo()
    if not todo:
        return
    stage.setup()
    made: set[Shard] = set()
    with tqdm(
        total=sum(map(stage.amount, todo)),
        desc=f"{stage.name} of {stage.pool.folder.name}",
        unit=stage.unit,
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        while todo:
            busy = [shard for shard in todo if not _attempt(stage, shard, made, bar)]
            if busy:
                time.sleep(WAIT)
            todo = busy or stage.todo()
            if lost := made.intersection(todo):
                raise RuntimeError(
                    f"{stage.name} {min(shard.name for shard in lost)} in {stage.pool.folder} "
                    "was written and is not there: the disk does not keep what it is given"
                )
    stage.close()


def _attempt(stage: Stage, shard: Shard, made: set[Shard], bar: tqdm) -> bool:
    """Whether nothing is left to do for `shard`; false where another process holds its lock."""
    with stage.pool.lock(stage.name, shard.row) as mine:
        if not mine:
            return False
        if shard in stage.missing(shard.row):
            stage.run(shard, bar.update)
            made.add(shard)
        elif bar.total:
            bar.total -= stage.amount(shard)  # another process has made it: the rate shown stays this one's
            bar.refresh()
    return True


def check_space(pool: Pool, stages: Sequence[Stage]) -> None:
    """InputError when the disk has less room than `stages` will fill."""
    needed = sum(stage.bytes_missing() for stage in stages)
    free = shutil.disk_usage(pool.folder).free
    if needed > free:
        raise InputError(
            f"pool {pool.folder} needs {needed / 2**30:.1f} GiB more, {free / 2**30:.1f} GiB "
            "are free: make room, set pool.root to a larger disk, or ask for fewer candidates"
        )

"""Pool generation: fill a pool with text, latents and scores, shard by shard, skipping shards that exist."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import nn

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings
from capo.backbones.unconditional import Unconditional
from capo.data.engines import Engine, LocalEngine
from capo.data.pool import Manifest, Pool, is_begun, pool_name
from capo.data.prompts import Prompt
from capo.data.scoring import ScoreStage
from capo.data.stages import LatentStage, Stage, TextStage
from capo.errors import InputError
from capo.rewards import Reward
from capo.runtime.fingerprints import content_fingerprint
from capo.runtime.names import check_name

COMMANDS = {
    "text": "text",
    "latents": "latents",
    "scores": "score",
}  # stage -> its name on the command line, generate.py stage=NAME
STAGES = tuple(COMMANDS)


def generator_fingerprint(
    backbone: Backbone,
    denoiser_fingerprint: str,
    settings: SamplerSettings,
    unconditional: Unconditional | None = None,
) -> str:
    """Fingerprint, 64 hex digits, of all that determines a latent besides prompt and seed.

    That is the denoiser, the sampler, steps, guidance, the precision unless it is 32-true, channels-last
    memory and compilation if they are on, and the network of the unconditional prediction unless it is the
    denoiser. The batch size is left out: it changes latents by rounding only, and each shard's header records
    it.
    """
    known = {
        "denoiser": denoiser_fingerprint,
        "sampler": backbone.sampler_identity(),
        "steps": settings.steps,
        "guidance": settings.guidance,
    }
    if settings.precision != "32-true":
        known["precision"] = settings.precision
    known |= {key: True for key in ("channels_last", "compile") if getattr(settings, key)}
    if unconditional:
        known["unconditional"] = unconditional.fingerprint
    return content_fingerprint(known)


@dataclass(frozen=True)
class ImageGenerator:
    """Generator of a pool's images: a backbone's pipeline, its denoiser (base or policy) and its settings.

    `unconditional` makes the unconditional prediction in place of the denoiser; the base has none. `engine`
    decides which processes do the work.
    """

    backbone: Backbone
    denoiser: nn.Module
    denoiser_fingerprint: str
    settings: SamplerSettings
    unconditional: Unconditional | None = None
    engine: Engine = field(default_factory=LocalEngine)

    @classmethod
    def base(
        cls, backbone: Backbone, settings: SamplerSettings, engine: Engine | None = None
    ) -> "ImageGenerator":
        """Generator that samples from the frozen base."""
        fingerprint = backbone.fingerprints["denoiser"]
        return cls(backbone, backbone.denoiser, fingerprint, settings, engine=engine or LocalEngine())

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of this generator; see `generator_fingerprint`."""
        return generator_fingerprint(
            self.backbone, self.denoiser_fingerprint, self.settings, self.unconditional
        )


@dataclass(frozen=True)
class PoolSpec:
    """Specification of a pool: `candidates` images for each of `prompts`, in a folder under `root`.

    `model` and `split` are parts of the folder's name; `seed` is the seed of the images. With `compared`, the
    candidates of a prompt are compared with each other, which takes two. Raises InputError if the names
    cannot be (`check_name`), or if there are no prompts, too few candidates or fewer than one prompt per
    shard.
    """

    root: Path
    model: str
    split: str
    seed: int
    prompts: Sequence[Prompt]
    candidates: int
    prompts_per_shard: int = 8
    compared: bool = True

    def __post_init__(self) -> None:
        check_name("model", self.model)
        check_name("split", self.split)
        if self.candidates < (least := 2 if self.compared else 1):
            why = f"fewer than {least} cannot be {'compared' if self.compared else 'drawn'}"
            raise InputError(
                f"pool of split '{self.split}': {self.candidates} candidates per prompt; "
                f"{why} (pool.candidates, or images per prompt)"
            )
        if self.prompts_per_shard < 1:
            raise InputError(f"pool.prompts_per_shard={self.prompts_per_shard} must be at least 1")
        if not self.prompts:
            raise InputError(
                f"pool of split '{self.split}': its prompt set is empty; give at least one prompt"
            )

    def folder(self, generator: str) -> Path:
        """Folder of the pool with the images of a generator, which is given by its fingerprint."""
        return Path(self.root) / pool_name(self.model, generator, self.seed, self.split)


def open_pool(spec: PoolSpec, generator: ImageGenerator) -> Pool:
    """Open the spec's pool, or create it, and append missing prompts; nothing is sampled.

    Raises InputError if the folder holds a pool made with other settings, or if the root is not writable.
    """
    manifest = _manifest(spec, generator)
    pool = Pool.create(spec.folder(manifest.generator), manifest)
    pool.require_split(spec.split)
    pool.append_prompts(spec.prompts, spec.split)
    pool.check_latent_shape(generator.backbone.latent_shape)
    return pool


def view_pool(spec: PoolSpec, generator: ImageGenerator) -> Pool | None:
    """Open the spec's pool, which may lack some of its prompts, or return None where none was begun.

    Nothing is written. Raises InputError as `open_pool` does.
    """
    manifest = _manifest(spec, generator)
    folder = spec.folder(manifest.generator)
    if not is_begun(folder):
        return None
    pool = Pool.open(folder)
    pool.require(manifest)
    pool.require_split(spec.split)
    pool.check_latent_shape(generator.backbone.latent_shape)
    return pool


def _manifest(spec: PoolSpec, generator: ImageGenerator) -> Manifest:
    fingerprints = generator.backbone.fingerprints
    return Manifest(
        prompts_per_shard=spec.prompts_per_shard,
        seed=spec.seed,
        generator=generator.fingerprint,
        latent_space=fingerprints["latent_space"],
        text_encoders=fingerprints["text_encoders"],
    )


def fill_pool(
    spec: PoolSpec,
    generator: ImageGenerator,
    rewards: Sequence[Reward] = (),
    *,
    stages: Sequence[str] = STAGES,
    progress: bool = True,
    verify: bool = True,
) -> Pool:
    """Generate what the spec's pool lacks: text, latents of all candidates, scores of all `rewards`.

    Any number of processes may fill the same pool at once. Rows are filled completely, so prompts of an
    earlier spec in the same rows are filled too.

    Args:
        spec: prompts, candidates and place of the pool.
        generator: generator of the latents.
        rewards: rewards that score the images.
        stages: stages to run, names from `STAGES`.
        progress: whether to show progress bars.
        verify: compare the checksums of existing shards and make damaged ones again; otherwise only headers
            and file sizes are checked.

    Returns:
        The pool, complete in all `stages`.

    Raises:
        InputError: if a stage is unknown or needs an incomplete stage that is not in `stages`, if there is
            too little disk space or no place for a file (checked before any work), or if a latent or score is
            not finite.
    """
    if unknown := set(stages) - set(STAGES):
        raise InputError(f"stage {', '.join(sorted(unknown))} is unknown; choose from {', '.join(STAGES)}")
    pool = open_pool(spec, generator)
    work = stages_of(pool, spec, generator, rewards, verify)
    wanted = [stage for stage in work if stage.name in stages]
    check_space(pool, wanted)
    for stage in work[: work.index(wanted[-1])] if wanted else ():
        if stage not in wanted and stage.todo():
            raise InputError(lacking(stage, f"stage={COMMANDS[wanted[-1].name]}"))
    pool.check_replaceable()
    generator.engine.run(wanted, progress)
    return pool


def lacking(stage: Stage, needed: str) -> str:
    """Message that says how many shards of a stage are missing, which `needed` needs, and what makes them."""
    return (
        f"pool {stage.pool.folder}: {len(stage.todo())} shards lack their {stage.name}, which {needed} "
        f"needs: run generate.py with the same values and stage={COMMANDS[stage.name]} first (stage=all runs "
        "every stage that is left)"
    )


def stages_of(
    pool: Pool,
    spec: PoolSpec,
    generator: ImageGenerator,
    rewards: Sequence[Reward],
    verify: bool,
    prompts: Sequence[Prompt] | None = None,
) -> list[Stage]:
    """Stages that fill a pool, in their order; with `verify`, they compare checksums of existing shards.

    They work on the rows of `prompts`, by default on those of all of the spec's prompts.
    """
    rows = pool.text_shards(pool.positions(spec.prompts if prompts is None else prompts))
    backbone, settings = generator.backbone, generator.settings
    guide = generator.unconditional and generator.unconditional.network
    return [
        TextStage(pool, rows, backbone, settings, verify),
        LatentStage(pool, rows, backbone, settings, verify, spec.candidates, generator.denoiser, guide),
        ScoreStage(pool, rows, backbone, settings, verify, rewards, spec.candidates),
    ]


def check_space(pool: Pool, stages: Sequence[Stage]) -> None:
    """Raise InputError if the missing shards of `stages` need more disk space than is free."""
    needed = sum(stage.bytes_missing() for stage in stages)
    free = shutil.disk_usage(pool.folder).free
    if needed > free:
        raise InputError(
            f"pool {pool.folder} needs {needed / 2**20:,.1f} MiB more, {free / 2**20:,.1f} MiB "
            "are free: make room, set pool.root to a larger disk, or ask for fewer candidates"
        )

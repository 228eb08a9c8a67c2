"""Build objects from Hydra's configuration; the rest of the package sees only objects and named values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from capo.backbones import Backbone, Family
from capo.backbones.export import load_policy, policy_fingerprint
from capo.backbones.inversion import Inversion
from capo.backbones.precision import common_half
from capo.backbones.sampling import SamplerSettings
from capo.backbones.unconditional import Unconditional, check_negative, unconditional_of
from capo.cli.named_rewards import all_rewards, held_out_rewards
from capo.cli.run_changes import AGAIN
from capo.cli.targets import Place, find, place_of, unusable
from capo.cli.values import plain
from capo.data.candidates import TrainingData
from capo.data.engines import Engine, LocalEngine
from capo.data.generation import STAGES, ImageGenerator, PoolSpec
from capo.data.importing.chosen import Imported
from capo.data.labels import HUMAN, LabelSource
from capo.data.pool.import_table import HUMAN_LABELS
from capo.data.prompts import Prompt, check_source, check_splits, missing_inputs
from capo.errors import InputError
from capo.evaluation.diversity import AUTO, encoder_of
from capo.noise import INVERTED
from capo.rewards import Reward, lookup
from capo.runtime.launch import launch
from capo.runtime.own_code import faults_of
from capo.runtime.processes import own_device
from capo.runtime.run_folder import OUTCOME, POLICY, read_outcome
from capo.runtime.terminal import typed

if TYPE_CHECKING:
    from capo.backbones.averaging import MovingReference


@dataclass(frozen=True)
class Components:
    """Objects that all stages share: the base with its sampler, prompts by split, rewards, and pool specs."""

    generator: ImageGenerator
    splits: dict[str, Sequence[Prompt]]
    rewards: list[Reward]
    evaluation_rewards: list[Reward]
    oracle: list[Reward]  # measures reported in evaluations beside the rewards; empty if the model has none
    pool_specs: dict[str, PoolSpec]  # train, validation, test, zero
    held_out: list[Reward] = field(default_factory=list)  # score validation images beside `rewards`
    encoder: Reward | None = None  # of `evaluation_rewards`, measures diversity in the process that evaluates

    @property
    def backbone(self) -> Backbone:
        """The backbone with the base weights."""
        return self.generator.backbone

    @property
    def judges(self) -> dict[str, list[Reward]]:
        """Rewards that score each of the pools."""
        return {
            "train": self.rewards,
            "validation": [*self.rewards, *self.held_out],
            "test": [*self.evaluation_rewards, *self.oracle],
            "zero": self.evaluation_rewards,
        }


def built(cfg: DictConfig, key: str, **given: object) -> Any:
    """Call the `_target_` at `key` with its arguments, as plain values, and those `given`.

    Raises InputError if nothing that belongs there has that name, if a value is missing, and for what code
    that is not of this package raises.
    """
    place = place_of(tuple(key.split(".")))
    assert place, key
    try:
        node = OmegaConf.to_container(OmegaConf.select(cfg, key), resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        missing = error.full_key or key
        raise InputError(f"{missing} is not given; give {missing}=VALUE") from error
    node, name = cast(dict, node), str(cast(dict, node).get("_target_"))
    with nullcontext() if name.startswith("capo.") else faults_of(f"{key}: {name}"):
        return lookup.build({**node, **given}, partial(looked_up, place, key))


def looked_up(place: Place, key: str, name: str) -> Any:
    """Return the object that belongs at `place` and has this name; InputError if there is none."""
    with faults_of(f"{key}._target_={name}: importing it"):
        try:
            return find(place, name)
        except (ImportError, AttributeError) as error:
            raise InputError(unusable(f"{key}._target_={name}", error)) from error


def target_name(node: DictConfig) -> str:
    """Name of the function that a group's choice calls."""
    return node._target_.rsplit(".", 1)[-1]


def prompt_splits(cfg: DictConfig) -> dict[str, Sequence[Prompt]]:
    """Load the prompt sets by split. Raises InputError for sets that are missing or cannot be used."""
    if missing := sorted(OmegaConf.missing_keys(cfg.prompts)):
        raise InputError(missing_inputs(missing, plain(cfg.prompts)))
    splits = built(cfg, "prompts")
    check_source(f"prompts: {cfg.prompts._target_}", splits)
    check_splits(splits)
    return splits


def build_components(
    cfg: DictConfig, scoring: bool = True, watching: bool = True, parts: Collection[str] | None = None
) -> Components:
    """Build the objects that generation, training and evaluation share; cheap checks precede loading.

    Args:
        cfg: the configuration.
        scoring: whether images will be scored; if so, the rewards' scorers are built.
        watching: whether validation images will be scored; otherwise there are no held-out rewards, which
            score nothing else.
        parts: parts of the base that are needed; see `base_of`.

    Returns:
        The components.

    Raises:
        InputError: prompts, rewards or weights are missing or cannot be used.
    """
    splits = prompt_splits(cfg)
    settings = sampler_settings(cfg)
    rewards, evaluated, oracle = all_rewards(cfg)
    held_out = held_out_rewards(cfg, rewards, evaluated) if watching else []
    specs = pool_specs(cfg, splits)
    if scoring and launch().local_rank == 0:
        # So that missing weights are found before images are generated. The other processes of a machine
        # load a scorer when it scores.
        for reward in {reward.key: reward for reward in [*rewards, *evaluated, *oracle, *held_out]}.values():
            reward.setup("cpu")
    # after the scorers, which it needs, and before the base, which takes longer
    wanted = cfg.evaluation.get("diversity", AUTO)  # runs of earlier versions have no such key
    encoder = encoder_of(wanted, evaluated) if scoring and launch().first else None
    generator = ImageGenerator.base(base_of(cfg, parts), settings)
    found = Components(generator, splits, rewards, evaluated, oracle, specs, held_out, encoder)
    for name, judges in found.judges.items():
        for reward in judges:
            reward.check_prompts([prompt.text for prompt in specs[name].prompts])
    return found


def sampler_settings(cfg: DictConfig) -> SamplerSettings:
    """Settings of the sampler, with the dtype in which text embeddings are stored for it and for training."""
    return SamplerSettings(
        **cfg.sampling, text_dtype=common_half(cfg.sampling.precision, cfg.trainer.precision)
    )


def use_base(cfg: DictConfig) -> None:
    """Let the key `base` of a configuration, where it is given, name the weights of its base."""
    if cfg.base is not None:
        cfg.model.backbone.weights = str(Path(str(cfg.base)).absolute())


def base_of(cfg: DictConfig, parts: Collection[str] | None = None) -> Backbone:
    """Load the base to work on this process's device (`own_device`), its denoiser stored as it draws.

    Of `parts` (`capo.backbones.parts`; None: all), only those given are loaded.
    """
    device = own_device(cfg.trainer.accelerator)  # first, since loading takes long
    only = {} if parts is None else {"parts": tuple(parts)}
    drawing = sampler_settings(cfg).drawing
    return built(cfg, "model.backbone", name=cfg.model.name, **only).prepare(drawing).to(device)


def is_negative(cfg: DictConfig) -> bool:
    """Whether the policy of this configuration is a negative model; a stored one may lack the key."""
    return bool(OmegaConf.select(cfg, "selection.swap"))


def tuned_generator(
    base: ImageGenerator,
    policy: Path,
    engine: Engine | None = None,
    negative: bool = False,
    run: Path | None = None,
) -> ImageGenerator:
    """Generator that samples from an exported policy with the settings of its base's generator.

    The engine is one for this policy, by default a local one. A `negative` model is not sampled itself: it
    makes the unconditional prediction of the base. Raises InputError if the settings would not read it, and
    if the policy is not the one that the outcome of its `run` names.
    """
    backbone, settings = base.backbone, base.settings
    if negative:
        check_negative(settings)
    denoiser = load_policy(backbone, policy, settings.drawing)
    fingerprint = policy_fingerprint(backbone, policy)
    if run and launch().first:  # others of a training need not see yet what the first one has written
        check_exported(run, fingerprint)
    if negative:
        network = Unconditional(denoiser, fingerprint)
        return replace(base, unconditional=network, engine=engine or LocalEngine())
    guide = unconditional_of(backbone, settings)
    return ImageGenerator(backbone, denoiser, fingerprint, settings, guide, engine or LocalEngine())


def check_exported(run: Path, fingerprint: str) -> None:
    """Raise InputError if the outcome of a run names another policy; that of a soup names none."""
    written = read_outcome(run).get("policy") or fingerprint
    if written != fingerprint:
        raise InputError(
            f"run={run}: its {POLICY}/ (fingerprint {fingerprint[:8]}) is not the policy of its {OUTCOME} "
            f"({written[:8]}), so it was changed after the export: restore it, export the best checkpoint "
            f"again (evaluate.py {typed('run', run)} {AGAIN}), or evaluate it without the run (evaluate.py "
            f"{typed('policy', run / POLICY)}, with the values of the run)"
        )


def family_of(cfg: DictConfig) -> tuple[type[Family], dict[str, Any]]:
    """Return the model's family and the keyword arguments of its backbone; nothing is loaded.

    Raises InputError for what is no backbone.
    """
    options, key = plain(cfg.model.backbone), "model.backbone"
    place, name = place_of(("model", "backbone")), options.pop("_target_")
    assert place
    family = looked_up(place, key, name)
    if not (isinstance(family, type) and issubclass(family, Backbone)):
        raise InputError(f"{key}._target_={name}: it is no subclass of capo.backbones.Backbone; name one")
    if missing := sorted(getattr(family, "__abstractmethods__", ())):
        raise InputError(f"{key}._target_={name}: it lacks {', '.join(missing)}; define these methods in it")
    return family, options


def inversion_of(cfg: DictConfig) -> Inversion | None:
    """How the policy inverts the latents of a batch; None unless `noise.source` says that it does."""
    # a stored configuration may lack the key
    return Inversion(**plain(cfg.noise.inversion)) if cfg.noise.get("source") == INVERTED else None


def moving_reference(cfg: DictConfig) -> MovingReference | None:
    """The reference that follows the policy; None where the base stays the reference."""
    # a stored configuration may lack the key
    if not cfg.get("reference") or None in (cfg.reference.decay, cfg.reference.interval):
        return None
    from capo.backbones.averaging import MovingReference  # with Lightning, which a plan does without

    return MovingReference(**plain(cfg.reference))


def label_sources(cfg: DictConfig, rewards: list[Reward]) -> Sequence[LabelSource]:
    """Preference labels: reward scores, or the human choices of an imported pool."""
    return [HUMAN] if cfg.pool.get("imported") and cfg.pool.labels == HUMAN_LABELS else rewards


def imported_pool(cfg: DictConfig, splits: dict[str, Sequence[Prompt]]) -> Imported:
    """Open the pool `pool.imported`, without the prompts of the validation and test splits."""
    return Imported.open(cfg.pool.imported, cfg.pool.labels, [*splits["validation"], *splits["test"]])


def check_imported(cfg: DictConfig) -> None:
    """Raise InputError if `pool.imported` is set but cannot be trained on; no weights are loaded."""
    if cfg.pool.get("imported"):
        imported_pool(cfg, prompt_splits(cfg))


def training_data(cfg: DictConfig, components: Components, stages: Sequence[str] = STAGES) -> TrainingData:
    """Training data that pairs are drawn from.

    For the base's own pool, `stages` are completed; for an imported pool, the scores.
    """
    labels = label_sources(cfg, components.rewards)
    if cfg.pool.get("imported"):
        return TrainingData.imported(imported_pool(cfg, components.splits), components.generator, labels)
    return TrainingData.sampled(
        components.pool_specs["train"], components.generator, components.rewards, stages
    )


def pool_specs(cfg: DictConfig, splits: dict[str, Sequence[Prompt]]) -> dict[str, PoolSpec]:
    """Specs of the base's four pools: train (candidates), validation, test, and zero (test, other seeds)."""

    def spec(split: str, seed: int, candidates: int, prompts: Sequence[Prompt]) -> PoolSpec:
        return PoolSpec(
            Path(cfg.pool.root), cfg.model.name, split, seed, prompts, candidates, cfg.pool.prompts_per_shard
        )

    evaluation, test = cfg.evaluation, splits["test"]
    return {
        "train": spec("train", cfg.pool.seed, cfg.pool.candidates, splits["train"]),
        "validation": spec("validation", evaluation.seed, cfg.validation.images, splits["validation"]),
        "test": spec("test", evaluation.seed, evaluation.images, test),
        "zero": spec("test", evaluation.seed + 1, evaluation.images, test[: evaluation.zero_prompts]),
    }

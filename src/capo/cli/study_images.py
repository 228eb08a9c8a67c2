"""Draw the images of a study, or find them in the pools of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from capo.cli.build import build_components, is_negative, prompt_splits, tuned_generator, use_base
from capo.cli.idle import refuse_both, refuse_training_keys
from capo.cli.process import prepare_process
from capo.cli.readiness import check_ready
from capo.cli.run_config import complete, run_config
from capo.cli.schema import Studying, check_values
from capo.data.generation import ImageGenerator
from capo.data.images import GeneratedImages
from capo.errors import InputError
from capo.evaluation.study.drawing import make_study, study_pairs
from capo.evaluation.study.store import Study
from capo.evaluation.study.turns import chosen_prompts
from capo.runtime.files import put_back
from capo.runtime.launch import launch
from capo.runtime.run_folder import EVALUATION, POLICY, POOLS

TUNED = "tuned"  # name of a policy beside its base
IMAGES = 2  # of a prompt: the fewest that a pool holds; the first is shown


def build_study(cfg: DictConfig, overrides: Sequence[str], folder: Path) -> Study:
    """Make or open the study in `folder` that `cfg` describes.

    The images of a run's evaluation are used where they are, and others are drawn as an evaluation draws
    them, into pools that an evaluation can use. Raises InputError where nothing can be compared, for two
    keys that each name a policy, and for values that cannot be used.
    """
    check_values(cfg, Studying)
    refuse_training_keys(cfg, overrides)
    refuse_both(cfg)
    if launch().world_size > 1:
        raise InputError("a study is served by one process: run it without the launcher")
    if cfg.run is not None:
        run = Path(str(cfg.run))
        own, policy, images = run_config(run, cfg, overrides), run / POLICY, run / EVALUATION / POOLS
        with complete(run):
            return _study(own, cfg.study, policy, images, folder, run)
    if cfg.policy is None:
        raise InputError("nothing to compare: give run=DIR or policy=FOLDER")
    use_base(cfg)
    return _study(cfg, cfg.study, Path(str(cfg.policy)), folder / POOLS, folder)


def _study(
    cfg: DictConfig, settings: DictConfig, policy: Path, images: Path, folder: Path, run: Path | None = None
) -> Study:
    other = None if settings.against is None else Path(str(settings.against))
    names = settings.names or ((TUNED, cfg.model.name) if other is None else (policy, other))
    one, two = map(str, names)
    if one == two:
        raise InputError(
            f"study.names: both sides are called {one}, which tables cannot tell apart; give two names that "
            "differ, study.names=[NAME,NAME]"
        )
    check_ready(cfg, scoring=False, watching=False)
    chosen = chosen_prompts(prompt_splits(cfg)["test"], settings.prompts, settings.seed)
    study_pairs(chosen, settings.checks, settings.seed)  # what it refuses, before images are drawn
    prepare_process(cfg.threads)
    components = build_components(cfg, scoring=False, watching=False)
    spec = replace(components.pool_specs["test"], prompts=chosen, candidates=IMAGES)

    def drawn(generator: ImageGenerator, root: Path) -> GeneratedImages:
        return GeneratedImages.fill(replace(spec, root=root), generator, [], progress=True)

    put_back(policy)
    base = components.generator
    first = drawn(tuned_generator(base, policy, negative=is_negative(cfg), run=run), images)
    if other is None:
        second = drawn(base, spec.root)
    else:
        put_back(other)
        second = drawn(tuned_generator(base, other), folder / POOLS)
    return make_study(
        folder,
        first,
        second,
        names=(one, two),
        seed=settings.seed,
        checks=settings.checks,
        ties=settings.ties,
    )

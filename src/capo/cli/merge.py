"""Run merge.py: write the soup of exported policies, and evaluate it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from capo.backbones.finding import pipeline_folder
from capo.backbones.merging import Base, merge_policies
from capo.backbones.model_card import write_win_rates
from capo.cli.build import build_components, family_of
from capo.cli.evaluate import evaluate_policy
from capo.cli.idle import refuse_training_keys
from capo.cli.messages import plain_errors
from capo.cli.places import check_results
from capo.cli.process import prepare_process
from capo.cli.readiness import check_ready, check_weights
from capo.cli.run_changes import check_tuned
from capo.cli.schema import Merging, check_group_choices, check_values
from capo.cli.values import plain
from capo.errors import InputError
from capo.runtime.files import check_inside, named_twice
from capo.runtime.launch import launch
from capo.runtime.run_folder import CONFIG, EVALUATION, POLICY, RESULTS
from capo.runtime.terminal import Terminal

console = Terminal()


def base_of_policies(cfg: DictConfig) -> Base:
    """Find the weights of the configured model, downloading them if needed; nothing is loaded."""
    check_weights(cfg)
    family, options = family_of(cfg)
    weights, revision, variant = str(options["weights"]), options.get("revision"), options.get("variant")
    folder = pipeline_folder(weights, revision, variant, family.unused_parts(**options))
    return Base(folder, family, weights, revision, variant)


def soup_of(
    cfg: DictConfig,
    policies: Sequence[str | Path],
    method: str,
    weights: Sequence[float] | None,
    folder: Path,
) -> Path:
    """Write the soup of policies of the configured model to `folder`/policy, and return that.

    With `cfg.evaluate`, it is evaluated into `folder`/evaluation. `weights`: one per policy; None: equal ones
    that sum to 1.
    """
    if cfg.evaluate:
        check_ready(cfg, watching=False)
    prepare_process(cfg.threads)
    shares = [1 / len(policies)] * len(policies) if weights is None else weights
    policy = merge_policies(base_of_policies(cfg), policies, folder / POLICY, method, shares)
    console.print(f"soup of {len(policies)} policies: {policy}", highlight=False, soft_wrap=True)
    if cfg.evaluate:
        components = build_components(cfg, watching=False)
        results = evaluate_policy(cfg, components, policy, folder / EVALUATION)
        write_win_rates(policy, results["win_rate"] if results else {})
    return policy


def check_named(policies: Sequence[str]) -> None:
    """Raise InputError for a policy that is named twice."""
    if twice := named_twice(map(Path, policies)):
        policy, first = twice
        also = "" if first == policy else f" and as {first}"
        raise InputError(
            f"policies: {policy} is named twice{also}: name it once, with a larger share by weights"
        )


def check_place(folder: Path, policies: Sequence[str], evaluate: bool) -> None:
    """Raise InputError if the soup would take the place of a run's policy, or be in one that is merged.

    So for one beside results of another soup, which would stay unless it is evaluated, for files of others
    that the evaluation would replace, and for folders that are links to elsewhere.
    """
    if evaluate:
        check_results(folder / EVALUATION)
    elif (folder / EVALUATION / RESULTS).exists():
        raise InputError(
            f"evaluate=false: {folder / EVALUATION} holds the results of the soup that is there; leave "
            "evaluate=false out, or choose another hydra.run.dir"
        )
    own = folder / POLICY
    if (folder / CONFIG).exists() or any(
        own.resolve().is_relative_to(Path(policy).resolve()) for policy in policies
    ):
        raise InputError(
            f"{own} would be replaced by the soup, but is the policy of a run, or one of policies or in one; "
            "choose another hydra.run.dir"
        )
    check_inside(folder, (POLICY, EVALUATION))


def run(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Merge `cfg.policies` into `folder`/policy, and return that; InputError where nothing can be merged.

    `overrides` are those of the command line.
    """
    check_values(cfg, Merging)
    refuse_training_keys(cfg, overrides)
    named = None if OmegaConf.is_missing(cfg, "policies") else plain(cfg)["policies"]
    if not isinstance(named, list) or len(named) < 2:
        raise InputError("nothing to merge: give two policies or more, policies=[FOLDER,FOLDER]")
    if launch().world_size > 1:
        raise InputError(
            "merge.py is one process: run it without the launcher, with evaluate=false, and then "
            "torchrun evaluate.py policy=FOLDER"
        )
    weights = None if cfg.weights is None else list(cfg.weights)
    policies = list(map(str, named))
    check_tuned(
        overrides,
        f"policies=[{','.join(policies)}]",
        "a soup is written in the form of the first one; leave that out",
    )
    check_named(policies)
    check_place(folder, policies, cfg.evaluate)
    return soup_of(cfg, policies, cfg.method, weights, folder)


def main(cfg: DictConfig) -> None:
    """Merge what the configuration names; user errors end the process with a message."""
    with plain_errors():
        own = HydraConfig.get()
        check_group_choices(cfg, own)
        run(cfg, Path(own.runtime.output_dir), list(own.overrides.task))

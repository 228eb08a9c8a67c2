"""Run merge.py: write the soup of exported policies."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from capo.backbones.loading import pipeline_folder
from capo.backbones.merging import Base, merge_policies
from capo.cli.build import family_of
from capo.cli.messages import plain_errors
from capo.cli.process import prepare_process
from capo.cli.readiness import check_weights, refuse_plans
from capo.cli.values import check_values
from capo.errors import InputError
from capo.runtime.run_folder import POLICY


def base_of_policies(cfg: DictConfig) -> Base:
    """Find the weights of the configured model, downloading them if needed; nothing is loaded."""
    check_weights(cfg)
    family, options = family_of(cfg)
    weights, revision, variant = (options.get(key) for key in ("weights", "revision", "variant"))
    folder = pipeline_folder(weights, revision, variant, family.unused_parts(**options))
    return Base(folder, family, str(weights), revision, variant)


def run(cfg: DictConfig, folder: Path) -> Path:
    """Write the soup of `cfg.policies` to `folder`/policy, and return that."""
    check_values(cfg)
    refuse_plans(cfg)
    if OmegaConf.is_missing(cfg, "policies") or len(cfg.policies) < 2:
        raise InputError("nothing to merge: give two policies or more, policies=[FOLDER,FOLDER]")
    prepare_process(cfg.threads)
    policies = list(cfg.policies)
    weights = list(cfg.weights) if cfg.weights else [1 / len(policies)] * len(policies)
    return merge_policies(base_of_policies(cfg), policies, folder / POLICY, cfg.method, weights)


def main(cfg: DictConfig) -> None:
    """Merge what the configuration names; user errors end the process with a message."""
    with plain_errors():
        policy = run(cfg, Path(HydraConfig.get().runtime.output_dir))
        Console().print(
            f"soup of {len(cfg.policies)} policies: {policy}\n"
            f"evaluate it by: python evaluate.py policy={policy} model={cfg.model.name}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

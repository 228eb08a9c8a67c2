"""Compare tuned policies with their base, reward by reward, on prompts that nothing before has seen.

    python evaluate.py run=outputs/DATE/TIME
    python evaluate.py runs=[outputs/A,outputs/B]
    python evaluate.py policy=FOLDER base=FOLDER model=shapes_unet
"""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from capo.comparison import compare_runs, run_folders
from capo.config import build_world, evaluate_policy, prepare_process, run_config
from capo.entry import plain_errors, start
from capo.errors import InputError
from capo.readiness import check_ready, refuse_plans
from capo.values import check_values

console = Console()


def evaluate_run(cfg: DictConfig, overrides: list[str]) -> dict:
    """Evaluate the policy of a run into its own folder, with the run's configuration."""
    folder = Path(cfg.run)
    own = run_config(folder, cfg, overrides)
    check_ready(own, watching=False)
    prepare_process(own.threads)
    return evaluate_policy(own, build_world(own, watching=False), folder / "policy", folder / "evaluation", curves=folder / "metrics.csv")


def evaluate_folder(cfg: DictConfig, folder: Path) -> dict:
    """Evaluate an exported policy with the composed configuration."""
    if cfg.base:
        cfg.model.backbone.weights = str(Path(cfg.base).absolute())
    check_ready(cfg, watching=False)
    prepare_process(cfg.threads)
    return evaluate_policy(cfg, build_world(cfg, watching=False), Path(cfg.policy), folder)


def run(cfg: DictConfig, overrides: list[str], folder: Path) -> dict | None:
    """One of the three: a run, several runs, a policy folder."""
    check_values(cfg)
    refuse_plans(cfg)
    if cfg.runs:
        return compare_runs(run_folders(cfg.runs), console)
    if cfg.run:
        return evaluate_run(cfg, overrides)
    if cfg.policy:
        return evaluate_folder(cfg, folder)
    raise InputError("nothing to evaluate: give run=DIR, runs=[DIR,DIR] or policy=FOLDER")


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    with plain_errors("the same command" if cfg.run else None):
        run(cfg, list(hydra_config.overrides.task), Path(hydra_config.runtime.output_dir))


if __name__ == "__main__":
    start(main)

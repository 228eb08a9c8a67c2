"""Make or complete the pools that `train.py` of the same configuration needs: candidates, validation, test and zero line.

    python generate.py pool.candidates=32
    python generate.py stage=scores rewards=looks
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from rich.console import Console

from capo.config import build_world, check_ready, prepare_process
from capo.entry import plain_errors, start
from capo.errors import InputError
from capo.generation import STAGES, fill_pool

console = Console()


def run(cfg: DictConfig) -> None:
    """Fill the four pools, or run one stage of each."""
    if cfg.stage not in ("all", *STAGES):
        raise InputError(f"stage={cfg.stage} is unknown; choose all, {', '.join(STAGES)}")
    check_ready(cfg)
    prepare_process(cfg.threads)
    world = build_world(cfg)
    stages = STAGES if cfg.stage == "all" else (cfg.stage,)
    for name, plan in world.plans.items():
        rewards = {"test": [*world.evaluation_rewards, *world.oracle], "zero": world.evaluation_rewards}.get(name, world.rewards)
        pool = fill_pool(plan, world.generator, rewards, stages=stages)
        console.print(f"{name}: {len(plan.prompts)} prompts x {plan.candidates} images in {pool.folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    with plain_errors("the same command"):
        run(cfg)


if __name__ == "__main__":
    start(main)

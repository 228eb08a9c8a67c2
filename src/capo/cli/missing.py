"""Find all that a run lacks on this machine, where `capo.cli.readiness` stops at the first fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo.cli.named_rewards import all_rewards, held_out_rewards
from capo.cli.rates import REWARD_PLACES
from capo.cli.readiness import check_draw, check_loggers, check_reward_weights, check_weights
from capo.cli.values import plain
from capo.data.pool.folder import PoolFolder
from capo.data.pool.manifest import check_root, is_begun
from capo.errors import InputError
from capo.preflight.shortages import Shortage
from capo.rewards import load_rewards
from capo.runtime.optimizers import check_optimizer
from capo.runtime.processes import check_accelerator, check_devices


def _attempt(kind: str, check: Callable[[], object]) -> list[Shortage]:
    try:
        check()
    except InputError as error:
        return [Shortage(kind, str(error))]
    return []


def _reward_findings(cfg: DictConfig, place: str) -> list[Shortage]:
    """Shortages of the rewards at the key `place`, each checked by itself."""
    entries = plain(OmegaConf.select(cfg, place) or OmegaConf.create())

    def check(name: str) -> None:
        check_reward_weights(load_rewards({name: entries[name]}, place))

    return [finding for name in sorted(entries) for finding in _attempt("rewards", partial(check, name))]


def likely_pools(cfg: DictConfig) -> dict[str, list[Path]]:
    """Name -> folders that may be this pool of the configuration; which is, only the base's weights tell."""
    seeds = {
        "train": (cfg.pool.seed, "train"),
        "validation": (cfg.evaluation.seed, "validation"),
        "test": (cfg.evaluation.seed, "test"),
        "zero": (cfg.evaluation.seed + 1, "test"),
    }
    root = Path(cfg.pool.root)
    return {
        name: sorted(root.glob(f"{cfg.model.name}-*-{seed}-{split}")) for name, (seed, split) in seeds.items()
    }


def _pool_findings(cfg: DictConfig) -> list[Shortage]:
    """Shortages of pools that were begun: one of them may be of another base of the same name."""
    folders = dict.fromkeys(folder for found in likely_pools(cfg).values() for folder in found)
    return [
        replace(finding, certain=False)
        for folder in folders
        for finding in _attempt("disk", lambda folder=folder: is_begun(folder) and PoolFolder.open(folder))
    ]


def find_missing(cfg: DictConfig) -> list[Shortage]:
    """All shortages of pools, weights, rewards, extras and device; each is checked by itself."""
    return [
        *_attempt("disk", lambda: check_root(Path(cfg.pool.root))),
        *_pool_findings(cfg),
        *_attempt("weights", lambda: check_weights(cfg)),
        *(finding for place in REWARD_PLACES for finding in _reward_findings(cfg, place)),
        *_attempt("rewards", lambda: held_out_rewards(cfg, all_rewards(cfg)[0], [])),
        *_attempt("extras", lambda: check_optimizer(cfg.trainer.optimizer)),
        *_attempt("extras", lambda: check_loggers(cfg)),
        *_attempt("configuration", lambda: check_draw(cfg)),
        *_attempt("device", lambda: check_accelerator(cfg.trainer.accelerator)),
        *_attempt("device", lambda: check_devices(cfg.trainer.accelerator, cfg.trainer.devices)),
    ]

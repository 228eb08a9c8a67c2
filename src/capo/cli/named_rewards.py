"""The rewards that a configuration names, by what they are for; none of them is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo.cli.process import worker_logs
from capo.cli.values import plain
from capo.evaluation.held_out import refuse_trained
from capo.rewards import Reward, load_rewards


def all_rewards(cfg: DictConfig, logs: Path | None = None) -> tuple[list[Reward], list[Reward], list[Reward]]:
    """Rewards used in training, rewards of the evaluation, and the oracle's measures; builds no scorer.

    `logs` is the folder for the logs of isolated rewards, by default that of an entry script.
    """
    oracle = rewards_of(cfg, "evaluation.oracle", logs) if cfg.evaluation.oracle else []
    trained = rewards_of(cfg, "rewards", logs)
    # a reward used in both training and evaluation is one object, so its weights are in memory once
    evaluated = _known(rewards_of(cfg, "evaluation.rewards", logs), trained)
    return trained, evaluated, oracle


def held_out_rewards(cfg: DictConfig, trained: Sequence[Reward], evaluated: Sequence[Reward]) -> list[Reward]:
    """Held-out rewards, which score only validation images; InputError for one that training uses."""
    if not cfg.validation.get("held_out"):  # a stored configuration may lack the key
        return []
    held_out = rewards_of(cfg, "validation.held_out")
    refuse_trained(held_out, trained)
    return _known(held_out, evaluated)


def benchmark_place(cfg: DictConfig) -> str | None:
    """Key of the rewards that score a benchmark's images: `benchmark.rewards`, or the key that it names."""
    given = OmegaConf.select(cfg, "benchmark.rewards")
    if not given:
        return None
    return given if isinstance(given, str) else "benchmark.rewards"


def _known(rewards: Sequence[Reward], others: Sequence[Reward]) -> list[Reward]:
    return [next((own for own in others if own == reward), reward) for reward in rewards]


def rewards_of(cfg: DictConfig, place: str, logs: Path | None = None) -> list[Reward]:
    """Rewards at the key `place`, sorted by name, so that their order does not depend on the command line."""
    entries = plain(OmegaConf.select(cfg, place))
    return sorted(load_rewards(entries, place, logs or worker_logs()), key=lambda reward: reward.name)

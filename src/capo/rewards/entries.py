"""Make rewards from their entries in a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from capo.errors import InputError
from capo.rewards import worker
from capo.rewards.environments import check_environment, not_installed
from capo.rewards.reward import Reward


def load_rewards(
    config: Mapping[str, Mapping[str, Any]], place: str = "rewards", logs: Path | None = None
) -> list[Reward]:
    """Create rewards, in order, from `{name: {scorer: {_target_: ...}, link: ..., ...}}`; build no scorer.

    Args:
        config: the rewards.
        place: their key in the configuration, for messages.
        logs: folder of the logs of scorers in other processes; None: a temporary one.

    Raises:
        InputError: there is no reward; a reward has an unknown key or no scorer; a required module is not
            installed (in its environment, for a reward with `python`); `python` is not an interpreter; or
            weights given as a path (/, ./, ../ or ~) do not exist.
    """
    if not config:
        raise InputError(f"{place}: no reward is configured; name at least one, as in rewards=shapes")
    if not isinstance(config, Mapping) or not all(isinstance(entry, Mapping) for entry in config.values()):
        raise InputError(f"{place}={config}: must be rewards by name, {{NAME: {{scorer: {{...}}}}}}")
    if without := [name for name, entry in config.items() if "scorer" in entry and not entry["scorer"]]:
        raise InputError(_no_scorer(without, place))
    return [_load(name, entry, place, logs) for name, entry in config.items()]


def _no_scorer(names: Sequence[str], place: str) -> str:
    first = names[0]
    group = "rewards" if place == "rewards" else f"rewards@{place}"
    return (
        f"{place}: {', '.join(names)} {'has' if len(names) == 1 else 'have'} no scorer. Bring your own, a "
        f"callable (images, prompts) -> (B,): `scorer: {{_target_: module.Class}}` in "
        f"conf/rewards/{first}.yaml, or +{place}.{first}.scorer._target_=module.Class on the command line; "
        f"or choose other rewards ({group}=shapes)"
    )


def _load(name: str, entry: Mapping[str, Any], place: str, logs: Path | None) -> Reward:
    known = [field.name for field in fields(Reward) if field.name not in ("name", "logs")]
    if unknown := sorted(set(entry) - set(known)):
        raise InputError(f"{place}.{name}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    if "scorer" not in entry:
        raise InputError(f"{place}.{name}: it has no scorer; add `scorer: {{_target_: module.Class, ...}}`")
    if "timeout" in entry and not {"python", "isolated"} & set(entry):
        raise InputError(
            f"{place}.{name}.timeout={entry['timeout']}: ends a scorer in another process; add isolated: "
            "true (or python: INTERPRETER), or leave it out"
        )
    _check_scorer(entry["scorer"], f"{place}.{name}.scorer")
    _check_requires(entry.get("requires", ()), f"{place}.{name}.requires")
    reward = Reward(name, **entry, logs=logs)
    if reward.python:
        root = str(entry["scorer"].get("_target_")).split(".")[0]  # capo itself need not be installed there
        check_environment(name, reward.python, [*reward.requires, *([] if root == "capo" else [root])])
    elif missing := worker.missing(reward.requires):
        raise InputError(not_installed(name, missing, reward.extra, reward.isolated))
    given = reward.weights or ""  # a path, or what the scorer knows by this name
    if given.startswith(("/", "./", "../", "~")) and not Path(given).expanduser().exists():
        raise InputError(
            f"reward '{name}': no weights at {reward.weights}; set {place}.{name}.weights to their location"
        )
    return reward


def _check_scorer(scorer: object, key: str) -> None:
    named = isinstance(scorer, Mapping) and isinstance(scorer.get("_target_"), str)
    if not named and (isinstance(scorer, Mapping) or not callable(scorer)):
        raise InputError(f"{key}={scorer}: must name what is called, {{_target_: module.Class, ...}}")


def _check_requires(modules: object, key: str) -> None:
    """InputError unless it is a list of names; looking for one of another form may import its package."""
    if isinstance(modules, str):
        raise InputError(f"{key}={modules}: must be a list, requires: [{modules}]")
    if not isinstance(modules, (list, tuple)) or not all(_is_module(name) for name in modules):
        raise InputError(
            f"{key}={modules}: must be a list of names of modules, as `import` takes them: no versions, and "
            "not the name that pip takes where it is another"
        )


def _is_module(name: object) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))

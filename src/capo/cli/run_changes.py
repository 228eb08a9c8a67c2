"""What may change between the configuration of a run and one that resumes it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from capo.errors import InputError
from capo.runtime.terminal import typed

# sections that act on training alone; of `trainer`, all keys but those of LAUNCHED_WITH
TRAINED_WITH = (
    "seed",
    "data",
    "objective",
    "reference",
    "pairs",
    "selection",
    "calibration",
    "noise",
    "anchor",
    "online",
    "validation",
    "rewards",
)
LAUNCHED_WITH = ("accelerator", "devices", "num_nodes", "strategy", "precision", "ema")
SWAP = "selection.swap"  # samples a policy as a negative model
AGAIN = "validation.strengths=[1]"  # of evaluate.py, exports a run's policy anew
EXPORT = ("export", "export_dtype")  # which may change until the policy is exported
# keys that may change when a run resumes: paths, loggers and held-out rewards, what follows training,
# settings that change a step by rounding only, and model.adapter_lr, model.beta and its range, which act only
# through trainer.lr and objective.beta (which are compared)
FREE = (
    "model.adapter_lr",
    "model.beta",
    "model.beta_range",
    "run_dir",
    "logger",
    "engine",
    "validation.held_out",
    "data.workers",
    "online.keep",
    "pool.root",
    "evaluate",
    "evaluation.diversity",
    "evaluation.diversity_prompts",
    *EXPORT,
    "push_to_hub",
    "plan",
    "planning",
    "check",
    "hydra",
    *(
        f"trainer.{key}"
        for key in (
            "strategy",
            "devices",
            "num_nodes",
            "micro_batch",
            "gradient_checkpointing",
            "compile",
            "compile_tolerance",
            "channels_last",
            "signal_every",
            "checkpoint_every",
            "reuse_reference",
        )
    ),
)
# keys that may change under any name: where a reward runs, its time limit, and known sizes of rewards and
# of prompt sets
FREE_WITHIN = re.compile(
    r"(evaluation\.)?(rewards|oracle)\.[^.]+\.(python|isolated|timeout|memory)|prompts\..+\.published_size"
)
MISSING = "(not there)"
STEPS = "trainer.max_steps"  # may grow
UNSET = {}, None  # both say that a mapping sets nothing

log = logging.getLogger(__name__)


def given_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that the command line gives; of a group, the one at which its choice stands."""
    return [override.split("=", 1)[0].lstrip("+~").split("@")[-1] for override in overrides]


def check_tuned(overrides: Sequence[str], asked: str, kept: str, exports: bool = False) -> None:
    """Refuse keys of an export that is not made, and warn of keys that act on training alone.

    Args:
        overrides: those of the command line.
        asked: key and value that name the policies, for the messages.
        kept: what becomes of their form.
        exports: whether a policy is chosen and exported anew nevertheless.

    Raises InputError for keys of an export if there is none.
    """
    keys = given_keys(overrides)
    export = [text for text, key in zip(overrides, keys, strict=True) if key in EXPORT]
    if export and not exports:
        raise InputError(f"{' '.join(export)} beside {asked}: {kept}")
    acting = {SWAP}
    if exports:
        acting |= {"validation", "rewards"}
    elif "benchmark" in keys:
        acting.add("rewards")
    for key in keys:
        section, _, name = key.partition(".")
        trains = section in TRAINED_WITH or (section == "trainer" and name and name not in LAUNCHED_WITH)
        if trains and not {key, section} & acting:
            more = "; rewards@evaluation.rewards=NAME measures with others" if section == "rewards" else ""
            log.warning(f"{key} acts on training alone: {asked} stays as it was trained{more}")


def _is_free(name: str) -> bool:
    return name in FREE or FREE_WITHIN.fullmatch(name) is not None


def compared(values: dict, prefix: str = "") -> dict[str, object]:
    """The values of a configuration that may not change while a run goes on, by their dotted keys."""
    found: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if _is_free(name) or name == STEPS:
            continue
        found |= compared(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def check_same_export(folder: Path, old: dict, new: dict) -> None:
    """Raise InputError if the policy of the finished run in `folder` would be exported in another form."""
    if other := " ".join(f"{key}={new[key]}" for key in EXPORT if old.get(key, new[key]) != new[key]):
        strengths = (old.get("validation") or {}).get("strengths")  # of which one was chosen
        anew = f"validation.strengths=[{','.join(map(str, strengths))}]" if strengths else AGAIN
        raise InputError(
            f"{other}: {folder} has finished, and its policy is exported otherwise; leave it out, or export "
            f"the policy anew: evaluate.py {typed('run', folder)} {anew} {other}"
        )


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """List `key: old -> new` where two configurations differ, except for keys that may change."""
    found = []
    for key in sorted(old.keys() | new.keys(), key=str):
        name = f"{prefix}{key}"
        if _is_free(name):
            continue
        before, after = old.get(key, MISSING), new.get(key, MISSING)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif before != after and not (before in UNSET and after in UNSET):
            found.append(f"{name}: {before} -> {after}")
    return found

"""The border: what Hydra composed, or a run stored, is compared with the schema before anything else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from capo.cli.choice_faults import experiment_with
from capo.cli.marks import TARGET
from capo.cli.schema.calls import CALLED, call_faults
from capo.cli.schema.scripts import Training
from capo.cli.targets import REWARDS, misplaced
from capo.cli.values import resolved
from capo.cli.yaml_files import value_at
from capo.errors import InputError
from capo.runtime.schema import Section, dotted, faults, leaves, shown

HOME = re.compile(r"~[^/\s]*(/|$)")  # a path in a user's home
# what the schema does not know: where a beta comes from that the command line does not give
NO_BETA = "objective.beta=null: "
BETA = "; give objective.beta=VALUE, or leave it out where the model has one for this objective (model.beta)"
# groups of which one choice counts; of others, such as rewards, several may be named
SINGLE = ("objective", "reference", "pairs", "prompts", "model", "trainer", "import", "engine", "benchmark")


def check_values(cfg: DictConfig, schema: type[Section] = Training) -> None:
    """Raise InputError with one line for each fault: key, value, and what it must be.

    Mandatory values (`???`) that the code which needs them reports are ignored.
    """
    values = _resolved(cfg, schema)
    refuse(dict(nameless(values)))
    wrong = dict(misplaced(values)) | dict(text_faults(values))
    wrong |= {
        key: fault
        for key, fault in faults(schema, values).items()
        if not any(place.startswith(f"{key}.") for place in wrong)
    }
    refuse({key: f"{_giver(key)}{fault}" for key, fault in wrong.items()})
    check_calls(values)


def _resolved(cfg: DictConfig, schema: type[Section]) -> dict[str, Any]:
    """Resolve `cfg`; of a group without a choice, that is the fault, and not what refers to it by ${...}."""
    try:
        return resolved(cfg)
    except InputError:
        unread = faults(schema, OmegaConf.to_container(cfg, resolve=False))
        refuse({group: f"{_giver(group)}{unread[group]}" for group in SINGLE if group in unread})
        raise


def nameless(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) of each place of rewards that a reward's own keys fill, without its name above."""
    for place in REWARDS:
        scorer = value_at(values, [*place.split("."), "scorer"])
        if isinstance(scorer, Mapping) and TARGET in scorer:
            yield (
                place,
                f"{place}.scorer: a reward's name must stand above its scorer; in the file of conf/rewards/ "
                "that is chosen, write NAME: {scorer: ...}",
            )


def _giver(key: str) -> str:
    """Beginning of a message about the value of `key`: the file of the chosen experiment that gives it."""
    if not HydraConfig.initialized():
        return ""
    own: Any = HydraConfig.get()  # typed as the schema, but a DictConfig
    folders = [Path(source.path) for source in own.runtime.config_sources if source.schema == "file"]
    path = experiment_with(key, own.overrides.task, folders)
    chosen = f" (a file of conf/{key}/ is chosen there by `defaults: [override /{key}: NAME]`)"
    return f"{path} has{chosen if key in SINGLE else ''} " if path else ""


def check_calls(values: Mapping[str, Any]) -> None:
    """Raise InputError for arguments that a user's own target does not take, from its signature.

    This imports the module of each target, so it follows the check of the values.
    """
    wrong: dict[str, str] = {}
    for place in CALLED:
        for key, fault in call_faults(place, values):
            wrong.setdefault(key, fault)
    refuse(wrong)


def check_stored(values: Mapping[str, Any], place: str) -> None:
    """Raise InputError where values of a run's config.yaml cannot be used; keys may be absent.

    `place` names the file in the message. No target's module is imported.
    """
    wrong = faults(Training, values, partial=True) | dict(text_faults(values))
    refuse({key: f"{place} has {fault}" for key, fault in wrong.items()}, "; restore it")


def text_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) of each text that no path, name or message can hold."""
    for path, value in leaves(values):
        key = dotted(path)
        if isinstance(value, str) and "\0" in value:
            yield key, f"{key}={shown(value)!r}: must be text without a null character, which ends a path"
        elif isinstance(value, str) and HOME.match(value) and expanduser(value) == value:
            yield key, f"{key}={shown(value)}: there is no user of this name, so write the path out"


def check_group_choices(cfg: DictConfig, own: Any) -> None:
    """Raise InputError where several choices of a group are named of which one counts.

    Of `objective=[capo,dpo]` Hydra merges both files, and does not record a choice. `own` is Hydra's
    configuration. A folder of hydra.searchpath that is not there is refused likewise.
    """
    for source in own.runtime.config_sources:
        named = source.schema == "file" and source.provider.startswith("hydra.searchpath")
        if named and not Path(source.path).is_dir():
            raise InputError(
                f"hydra.searchpath: there is no folder {source.path}; give one with groups in it"
            )
    for group in SINGLE:
        if group in cfg and group not in own.runtime.choices:
            named = [text for text in own.overrides.task if text.lstrip("~").partition("=")[0] == group]
            given = named[-1] if named else group
            names = given.partition("=")[2].strip("[]")
            sweep = f", or compare several in a sweep: -m {group}={names}" if names else ""
            raise InputError(f"{given}: one choice of {group} is needed; give {group}=NAME{sweep}")


def refuse(found: Mapping[str, str], remedy: str = "") -> None:
    """Raise InputError with one line for each fault, which `remedy` ends."""
    asked = not remedy  # by the command, which can give a value
    lines = [f"{fault}{BETA}" if asked and NO_BETA in fault else fault for fault in found.values()]
    if lines:
        told = lines[0] if len(lines) == 1 else "\n  ".join(["these values cannot be used:", *lines])
        raise InputError(told + remedy)

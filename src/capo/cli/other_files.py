"""Find what has a key that a command did not compose: another choice of a group, or another command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from capo.cli.yaml_files import read_yaml, value_at
from capo.errors import InputError

DEFAULTS = "defaults"
ABSENT = object()
NO_DEFAULT = re.compile(r"Could not override '([^'@]+?)'\.\s+No match in the defaults list")


def other_choice(key: str, conf: Path, experiments: Sequence[str] = ()) -> str | None:
    """Message for an unknown key that files of its group have, none of which is chosen; None for any other.

    `conf` holds the groups of files; `experiments` are those that are chosen, beside which another one stands
    in a list.
    """
    group, _, rest = key.partition(".")
    choices = _choices(group, rest, conf) or _choices(group, key, conf)  # of the section, or of all keys
    if not choices:
        group, choices = "experiment", _choices("experiment", key, conf)
        if experiments:
            names = [choice.partition("=")[2] for choice in choices]
            choices = [f"experiment=[{','.join([*experiments, name])}]" for name in names]
    if not choices:
        return None
    scripts, given = _scripts(group, conf), "it" if len(choices) == 1 else "one of them"
    extra = "" if group == "experiment" and experiments else " too"
    place = "" if len(scripts) == len(list(conf.glob("*.yaml"))) else f", to {' or '.join(scripts)}"
    return f"there is no key '{key}' without {' or '.join(choices)}: give {given}{extra}{place}"


def _choices(group: str, key: str, conf: Path) -> list[str]:
    """Choices of a group whose files have a key."""
    files = sorted((conf / group).glob("*.yaml")) if key else []
    return [f"{group}={file.stem}" for file in files if _has(file, key.split("."))]


def other_script(key: str, conf: Path) -> str | None:
    """Message for an unknown key, or group, that other commands have, whose files `conf` holds; else None."""
    scripts = _scripts(key, conf)
    has = "has" if len(scripts) == 1 else "have"
    return f"this command has no key '{key}'; {' and '.join(scripts)} {has}" if scripts else None


def _scripts(key: str, conf: Path) -> list[str]:
    """Commands that have a key or group."""
    return [command_of(file.stem) for file in sorted(conf.glob("*.yaml")) if _has(file, key.split("."))]


def command_of(config: str) -> str:
    """The command whose main file in conf/ has that name."""
    return "python -m capo.cli.study" if config == "study" else f"{config}.py"


def absent_group(message: str, conf: Path) -> str | None:
    """Message for a group that a command does not have, from Hydra's; None for any other error."""
    found = NO_DEFAULT.search(message)
    return other_script(found[1], conf) if found else None


def _has(file: Path, parts: Sequence[str]) -> bool:
    """Whether a file, or one that its defaults list names, gives that key a value or a choice of a group."""
    node: Any = None
    with suppress(InputError, FileNotFoundError):  # Hydra tells what is wrong with a file that is chosen
        node = read_yaml(file, dict, "correct it")
    if not isinstance(node, dict):
        return False
    for entry in node.get(DEFAULTS, []):
        if isinstance(entry, str) and entry != "_self_" and _has(file.parent / f"{entry}.yaml", parts):
            return True
        for name, choice in entry.items() if isinstance(entry, dict) else ():
            group, _, place = name.removeprefix("override ").partition("@")
            if [group] == list(parts):
                return True
            if place == parts[0] and _has(file.parent / group / f"{choice}.yaml", parts[1:]):
                return True
    return value_at(node, parts, ABSENT) is not ABSENT

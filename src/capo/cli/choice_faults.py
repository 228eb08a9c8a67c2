"""Messages for files that the command line chooses from the groups of conf/: with the key that chose them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from capo.cli.yaml_files import read_yaml, value_at
from capo.errors import InputError, closest

CHOICE = re.compile(r"\+?(?P<key>(?P<group>[\w/]+)(@[\w.]+)?)=(?P<value>\[.*\]|[A-Za-z_./].*)")
NAME = re.compile(r"[^\[\],\s'\"]+")
TWICE = re.compile(
    r"(Multiple values for )?(?P<key>[\w/]+(@[\w.]+)?)(\. To override| appears more than once)"
)
EXPERIMENT = "experiment"
MISSING = "???"  # OmegaConf's value that is not given
LISTED = (EXPERIMENT, "rewards")  # groups of which several files make sense together
OPTIONAL = (EXPERIMENT, "import", "benchmark")  # groups of which no file at all may be chosen
LAUNCHER = "hydra/launcher"
PLUGINS = ("submitit", "joblib")  # launchers that an extra of this name installs
HELD_OUT = "rewards@validation.held_out", "validation.held_out"  # which `messages.grouped` rewrites


def unknown_choice(group: str, choice: str, options: Sequence[str], arguments: Sequence[str]) -> str:
    """Message for a name that is no file of a group, under the key of the command line that gave it."""
    given = [found for argument in arguments if (found := CHOICE.fullmatch(argument))]
    path = next(
        (found for found in given if f"{found['group']}/{found['value']}" == f"{group}/{choice}"), None
    )
    if path and path["group"] != group:
        key, name = _typed(path["key"]), Path(choice).stem
        return (
            f"{key}={path['value']}: a file of conf/{path['group']}/ is named without its folder; give "
            f"{key}={name}, and --config-dir=FOLDER at the end for a FOLDER with your own "
            f"{path['group']}/{name}.yaml"
        )
    own = [found for found in given if found["group"] == group and choice in NAME.findall(found["value"])]
    key = _typed(own[0]["key"]) if own else group
    name = re.compile(rf"(?<![\w./-]){re.escape(choice)}(?![\w./-])")
    near = [
        f"{key}={name.sub(other, own[0]['value']) if own else other}" for other in closest(choice, options)
    ]
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    plugin = next((name for name in PLUGINS if group == LAUNCHER and choice.startswith(name)), None)
    if plugin:
        meant = f"; pip install -e '.[{plugin}]' adds it"
    return f"{key}={choice}: no such choice; there are {', '.join(options)}{meant}"


def no_names(error: BaseException) -> str | None:
    """Message for a group that gets a number or null where a file is to be named; None for another error.

    Hydra names neither the argument nor, in a list, the fault itself: both are read from what it was given.
    """
    groups, given = local_of(error, "repo"), local_of(error, "overrides_list")
    if not isinstance(error, (TypeError, ValueError)) or groups is None or given is None:
        return None
    for override in given:
        group, value = override.key_or_group, None if override.is_sweep_override() else override.value()
        names = value if isinstance(value, list) else [value]
        left_alone = isinstance(value, dict) or (override.is_delete() and value is None)  # a section; ~GROUP
        if override.is_sweep_override() or left_alone or not groups.group_exists(group):
            continue
        if all(isinstance(name, str) for name in names):
            continue
        key, _, text = _typed(override.input_line.lstrip("+~")).partition("=")
        if value is None:
            none = f"leave it out, or give {key}=[] for none" if key in OPTIONAL else f"give {key}=NAME"
            return f"{key}={text}: it must name a file of conf/{group}/; {none}"
        return (
            f"{key}={text}: it must name a file of conf/{group}/; give {key}=NAME, in quotes where it reads "
            f"as something else ('{key}=\"1e3\"')"
        )
    return None


def local_of(error: BaseException, name: str) -> Any:
    """Value of a local variable where `error` was raised, or nearest above; None if there is none."""
    found = [frame.f_locals.get(name) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((value for value in reversed(found) if value is not None), None)


def repeated(overrides: Sequence[str]) -> str | None:
    """Message for a group of lists that is given twice, or lists a name twice; None for any other.

    Hydra takes the last without a word, or the name once.
    """
    for group in LISTED:
        given = [text for text in overrides if text.partition("=")[0] == group]
        names = [name for text in given for name in NAME.findall(text.partition("=")[2])]
        once = list(dict.fromkeys(names))
        if len(given) > 1 or (len(names) > len(once) and f"{group}=[" in given[0]):
            why = "the last alone would count" if len(given) > 1 else "a name stands there twice"
            return f"{' '.join(given)}: {why}; give one list, {group}=[{','.join(once)}]"
    return None


def twice_chosen(message: str, arguments: Sequence[str]) -> str | None:
    """Message for a group of which a + or an experiment chooses a second file; None for any other error."""
    found = TWICE.match(message)
    given = [
        argument for argument in arguments if found and argument.lstrip("+").startswith(f"{found['key']}=")
    ]
    if not found or not any(argument.startswith("+") for argument in given):
        name = message.rstrip("'").rpartition(": ")[2]
        if not found or not message.endswith("'") or not experiments(arguments):
            return None
        return (
            f"{EXPERIMENT}={','.join(experiments(arguments))}: its defaults choose a second file of "
            f"{found['key']}; write `override /{found['key']}: {name}` there in place of "
            f"`/{found['key']}: {name}`"
        )
    key = _typed(found["key"])
    names = [name for argument in given for name in NAME.findall(argument.partition("=")[2])]
    if len(names) == 1:
        remedy = f"{key}={names[0]} alone"
    elif key.partition("@")[0] in LISTED or key in HELD_OUT:
        remedy = f"one list, {key}=[{','.join(names)}]"
    else:
        remedy = f"one of them: {' or '.join(f'{key}={name}' for name in names)}"
    return (
        f"{' '.join(map(_typed, given))}: {key} is chosen already, and + adds a second choice; give {remedy}"
    )


def below_a_value(key: str, arguments: Sequence[str], conf: Path) -> str | None:
    """Message for an unknown key below one to which an experiment gives a single value; else None.

    `conf` holds the files of the experiments. The value itself Hydra has replaced when it refuses the key.
    """
    from capo.runtime.schema import shown  # with pydantic, which --help does without

    for name in experiments(arguments):
        node: Any = None
        with suppress(InputError, FileNotFoundError):  # it lies in a folder of the user's own
            node = read_yaml(conf / EXPERIMENT / f"{name}.yaml", dict, "correct it")
        below = key.split(".")
        while below and isinstance(node, dict):
            node = node.get(below.pop(0))
        if below and node is not None:
            above = key.removesuffix(f".{'.'.join(below)}")
            whole = next(
                (text.partition("=")[2] for text in arguments if text.startswith(f"{key}=")), "VALUE"
            )
            for part in reversed(below):
                whole = f"{{{part}: {whole}}}"
            return (
                f"there is no key '{key}' beside experiment={name}, which sets {above}={shown(node)}, a "
                f"single value: leave that experiment out, or give all of it, '{above}={whole}'"
            )
    return None


def experiment_with(key: str, arguments: Sequence[str], folders: Sequence[Path]) -> Path | None:
    """File of a chosen experiment that gives the value of `key`; None if none does, or an argument itself.

    `folders` hold groups of files, in the order in which they are searched.
    """
    if any(text.lstrip("+").partition("=")[0] == key for text in arguments):
        return None
    for name in experiments(arguments):
        files = [folder / EXPERIMENT / f"{name}.yaml" for folder in folders]
        path = next((file for file in files if file.is_file()), None)
        node: Any = None
        with suppress(InputError):  # an alias, say, which Hydra reads
            node = read_yaml(path, dict, "correct it") if path else None
        if value_at(node, key.split("."), MISSING) != MISSING:
            return path
    return None


def experiments(arguments: Sequence[str]) -> list[str]:
    """Names of the experiments that the command line chooses, the last first."""
    given = [found for argument in arguments if (found := CHOICE.fullmatch(argument))]
    own = [found["value"] for found in given if found["group"] == EXPERIMENT]
    return [name for value in reversed(own) for name in reversed(NAME.findall(value))]


def _typed(text: str) -> str:
    """A key, or an override, in the form that is documented: that of validation.held_out is rewritten."""
    return text.replace(*HELD_OUT)

"""Messages for keys of the command line that Hydra cannot set, add or remove: with what to give instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import Container, DictConfig, OmegaConf

from capo.cli.choice_faults import below_a_value, experiments, local_of
from capo.cli.other_files import absent_group, other_choice, other_script
from capo.cli.yaml_files import value_at
from capo.errors import alike

UNKNOWN = re.compile(r"Could not override '(.+?)'")
ABSENT = re.compile(r"Could not delete from config\. '(.+?)' does not exist")
OTHER_VALUE = re.compile(r"Could not delete from config\. The value of '(.+?)' is (.*) and not (.*)\.$", re.S)
PRESENT = re.compile(r"Could not append to config\. An item is already at '(.+?)'")
FORCED = re.compile(r"force-add of config groups is not supported: '\+\+(.+)'")
UNCHOSEN = re.compile(r"Could not delete '(.+?)=(.+)'\. No match in the defaults list")
KEPT = re.compile(r"Error merging override (~\S+)")
NO_GROUP = re.compile(r"Override (.+) looks like a config group override")


def key_fault(error: BaseException, arguments: Sequence[str], conf: Path) -> str | None:
    """Message for a key that cannot be set, added or removed; None for any other error.

    `conf` holds the groups of files.
    """
    message, parent = str(error), getattr(error.__cause__, "parent_node", None)
    if (found := UNKNOWN.search(message)) and isinstance(parent, DictConfig):
        key = str(getattr(error.__cause__, "full_key", None))
        key = key if key.startswith(f"{found[1]}.") else found[1]  # the former in a mapping that is given
        return _unknown(found[1], key, parent._get_root(), arguments, conf)
    override, cfg = local_of(error, "override"), local_of(error, "cfg")
    if found := ABSENT.match(message):
        near = alike(found[1], _keys(cfg)) if isinstance(cfg, DictConfig) else []
        remedy = _meant([f"~{key}" for key in near]) if near else "; leave it out; `--cfg job` lists all keys"
        return f"~{found[1]}: there is no key '{found[1]}' to remove{remedy}"
    if found := OTHER_VALUE.match(message):
        key, value, given = found.groups()
        return f"~{key}={given}: {key} is {value}, and only that is removed; give ~{key}"
    if found := PRESENT.match(message):
        key, value = found[1], getattr(override, "input_line", "").partition("=")[2] or "VALUE"
        return f"+{key}={value}: {key} has a value already, and + adds a key; give {key}={value}"
    if found := FORCED.match(message):
        return f"++{found[1]}: ++ is for keys, and this is a group; give {found[1]}"
    if found := UNCHOSEN.match(message):
        group, name = found.groups()
        return (
            f"~{group}={name}: conf/{group}/{name}.yaml is not chosen, so it cannot be removed; name "
            f"those that are to be chosen, {group}=NAME, or remove a key, ~{group}.KEY"
        )
    if (found := KEPT.match(message)) and "not support deletion" in str(error.__cause__):
        return f"{found[1]}: this key cannot be removed; leave it out, or give {found[1][1:]}=VALUE"
    if found := NO_GROUP.match(message):
        return (
            f"{found[1]}: @ stands between a folder of conf/ and the key that a file in it fills; give "
            "GROUP@KEY=NAME (rewards@evaluation.rewards=looks, say), or KEY=VALUE without @"
        )
    return absent_group(message, conf)


def unreadable(argument: str, reason: str) -> str:
    """Message for an argument that Hydra cannot read, of which it gives the reason."""
    if argument[0] in "\u2010\u2011\u2012\u2013\u2014\u2212":
        return f"'{argument}' begins with a dash of word processors; type the - of the keyboard in its place"
    if found := re.search("[\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb]", argument):
        return f"'{argument}' has {found[0]}, which quotes nothing; type \" or ' in place of it"
    key, equal, value = argument.partition("=")
    if equal and key != key.rstrip():
        return f"'{argument}' has a space before =; give {key.rstrip()}={value.lstrip()}"
    lines = [line for line in reason.splitlines() if not line.startswith(("Error parsing", "See ", "Lexer"))]
    why = " ".join(line for line in lines if line.strip(" ^") not in ("", argument))
    remedy = "write key=value, and quote values with brackets, spaces or ~"
    return f"'{argument}' cannot be read{f' ({why})' if why else ''}; {remedy}"


def _unknown(given: str, key: str, cfg: Container, arguments: Sequence[str], conf: Path) -> str:
    """Message for a `key` that `cfg` does not hold, itself `given` by an argument or in a mapping there."""
    if (fault := below_a_value(key, arguments, conf)) is not None:
        return fault
    for text in arguments:
        if text.startswith("~") and f"{key}.".startswith(f"{text[1:].partition('=')[0]}."):
            return f"there is no key '{key}', since {text} removes it; leave {text} out"
    if (added := _addable(key, cfg, arguments)) is not None:
        return f"{key} has no value here that could be replaced; give {added}, which adds it"
    if (
        fault := other_choice(key, conf, experiments(arguments)[::-1]) or other_script(key, conf)
    ) is not None:
        return fault
    near = [name for name in alike(key, _keys(cfg)) if name != given]
    if near:
        return f"there is no key '{key}'{_meant(near)}"
    if given != key and (conf / given).is_dir():
        return f"there is no key '{key}'; give {given}=NAME, a file of conf/{given}/, or {given}.KEY=VALUE"
    return f"there is no key '{key}'; `--cfg job` lists all keys"


def _addable(key: str, cfg: Container, arguments: Sequence[str]) -> str | None:
    """Argument that adds a key which the schema has beside those of `cfg`, since it may be left out."""
    from capo.cli.schema.scripts import Training  # with pydantic, which --help does without
    from capo.runtime.schema import NO_ARGUMENT, NO_KEY, faults

    if key.partition(".")[0] not in Training.model_fields:
        return None
    value = next((text.partition("=")[2] for text in arguments if text.startswith(f"{key}=")), None)
    values, (*above, name) = OmegaConf.to_container(cfg, resolve=False), key.split(".")
    section = value_at(values, above)
    if value is None or not isinstance(section, dict) or not section:  # Hydra has made what was no section
        return None
    section[name] = value
    fault = faults(Training, values).get(key, "")
    return None if NO_ARGUMENT in fault or NO_KEY in fault else f"+{key}={value}"


def _meant(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?"


def _keys(cfg: Container) -> list[str]:
    """Top-level keys, and the dotted key of every value."""
    found: list[str] = []

    def walk(node: object, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, value in node.items():
                walk(value, f"{key}.{name}" if key else name)
        else:
            found.append(key)

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return [*dict.fromkeys([*map(str, cfg), *found])]

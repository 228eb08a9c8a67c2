"""Read YAML files that lie in directories of runs, which anyone may have edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf

from capo.errors import DamagedFile
from capo.runtime.reading import read_text

Kind = TypeVar("Kind", dict[str, Any], list[Any])


def read_yaml(path: Path, kind: type[Kind], remedy: str) -> Kind:
    """Read a YAML file as OmegaConf does, as plain values; references (`${...}`) stay as they are.

    Errors as in `read_text`, and DamagedFile for text that is not YAML, for another kind of value, and for
    aliases: no run writes them, and a few lines of them can stand for more than memory holds.
    """
    text = read_text(path, remedy)
    try:
        if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise DamagedFile(path, "it has an alias (*), which no run writes", remedy)
        found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except DamagedFile:
        raise
    except Exception as error:  # odd values end in errors of many kinds, in YAML and in OmegaConf
        reason = " ".join((str(error) or type(error).__name__).split())
        raise DamagedFile(path, f"it is not YAML: {reason}", remedy) from error
    if not isinstance(found, kind):
        raise DamagedFile(path, "it holds no " + ("keys with values" if kind is dict else "list"), remedy)
    return found


def value_at(values: object, parts: Sequence[str], absent: Any = None) -> Any:
    """Value below the keys `parts` of nested mappings; `absent` where one of them is not there."""
    for part in parts:
        if not isinstance(values, Mapping) or part not in values:
            return absent
        values = values[part]
    return values

"""A composed configuration as plain values."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo.errors import InputError, first_line


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve the configuration to plain values; OmegaConf's error for a `${...}` that cannot be resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))  # a mapping gives nothing else


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Resolve the configuration to plain values; InputError for a `${...}` that cannot be resolved."""
    try:
        return plain(cfg)
    except OmegaConfBaseException as error:
        raise InputError(unresolved(error)) from error


def unresolved(error: OmegaConfBaseException) -> str:
    """Message for a value that names another by ${...}, which is not there or cannot be had."""
    if not error.full_key:
        return f"a value cannot be resolved ({first_line(error)}); give it itself, in place of its ${{...}}"
    return f"{error.full_key} cannot be resolved ({first_line(error)}); give {error.full_key}=VALUE itself"

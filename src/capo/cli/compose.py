"""Compose a configuration in programs that Hydra does not start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import capo
from capo.cli.messages import command_fault
from capo.errors import InputError

COMPOSING = HydraException, OmegaConfBaseException  # what Hydra raises for overrides
REPOSITORY = Path(capo.__file__).parents[2]  # holds conf/ in an editable install


def composed(name: str | None, overrides: Sequence[str], folder: Path = REPOSITORY / "conf") -> DictConfig:
    """Compose `folder`/`name`.yaml with `overrides`; with name None, from the overrides alone.

    Raises InputError for overrides that cannot be used.
    """
    try:
        with initialize_config_dir(str(folder.absolute()), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    except (*COMPOSING, YAMLError, ValueError, TypeError, RecursionError) as error:
        if (fault := command_fault(error, overrides)) is not None:
            raise InputError(fault) from error
        if not isinstance(error, COMPOSING):
            raise
        raise InputError(
            f"{' '.join(overrides)}: cannot be used ({str(error).splitlines()[0]}); write NAME.key=value"
        ) from error

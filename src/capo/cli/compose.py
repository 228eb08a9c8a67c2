"""Compose a configuration in programs that Hydra does not start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import capo
from capo.errors import InputError

REPOSITORY = Path(capo.__file__).parents[2]  # holds conf/ in an editable install


def composed(name: str | None, overrides: Sequence[str], folder: Path = REPOSITORY / "conf") -> DictConfig:
    """Compose `folder`/`name`.yaml with `overrides`; with name None, from the overrides alone.

    Raises InputError for overrides that cannot be used.
    """
    try:
        with initialize_config_dir(str(folder.absolute()), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(
            f"{' '.join(overrides)}: cannot be used ({str(error).splitlines()[0]}); write NAME.key=value"
        ) from error

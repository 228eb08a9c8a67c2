"""Resolvers: what `${shipped:...}` and `${evaluation_folder:...}` in the configuration stand for."""

from __future__ import annotations

import importlib.resources
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from capo.runtime.run_folder import CONFIG


def shipped(name: str) -> str:
    """Absolute path of what ships with the package under `shapes/weights/<name>`."""
    return str(importlib.resources.files("capo.shapes") / "weights" / name)


def _evaluation_folder(run: str | None) -> str:
    """Where an evaluation keeps Hydra's own output: in the run that it evaluates, else in a folder of its own."""
    return (
        f"{run}/evaluation"
        if run and (Path(run) / CONFIG).is_file()
        else datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-evaluate")
    )


def register() -> None:
    """Makes the resolvers known to OmegaConf; Hydra composes a configuration only after this."""
    OmegaConf.register_new_resolver("shipped", shipped, replace=True)
    OmegaConf.register_new_resolver("evaluation_folder", _evaluation_folder, replace=True, use_cache=True)

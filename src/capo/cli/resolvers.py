"""Resolve `${shipped:...}` and `${evaluation_folder:...}` in the configuration."""

from __future__ import annotations

import importlib.resources
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from capo.runtime.run_folder import CONFIG


def shipped(name: str) -> str:
    """Absolute path of `shapes/weights/<name>` in the installed package."""
    return str(importlib.resources.files("capo.shapes") / "weights" / name)


def _evaluation_folder(run: str | int | None) -> str:
    """Directory for Hydra's output of an evaluation: in the evaluated run, else a new one under outputs/."""
    return (
        f"{run}/evaluation"
        if run not in (None, "") and (Path(str(run)) / CONFIG).is_file()
        else datetime.now().strftime("outputs/%Y-%m-%d/%H-%M-%S-evaluate")
    )


def register() -> None:
    """Register the resolvers with OmegaConf; this must precede the composition of a configuration."""
    OmegaConf.register_new_resolver("shipped", shipped, replace=True)
    OmegaConf.register_new_resolver("evaluation_folder", _evaluation_folder, replace=True, use_cache=True)

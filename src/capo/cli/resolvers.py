"""Functions that the configuration calls, as in `${shipped:unet}`."""

from __future__ import annotations

import importlib.resources
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf


def shipped(name: str) -> str:
    """Absolute path of `shapes/weights/<name>` in the installed package."""
    return str(importlib.resources.files("capo.shapes") / "weights" / name)


def quotient(number: int, divisor: int) -> int:
    """`number // divisor`: the prompts of a batch, say, from its latents and those of a prompt."""
    return number // divisor


def _folder_in(run: str | int | None, name: str, ending: str) -> str:
    from capo.runtime.run_folder import CONFIG  # with pydantic, which --help does without

    return (
        f"{run}/{name}"
        if run not in (None, "") and (Path(str(run)) / CONFIG).is_file()
        else datetime.now().strftime(f"outputs/%Y-%m-%d/%H-%M-%S-{ending}")
    )


def _evaluation_folder(run: str | int | None) -> str:
    """Directory for Hydra's output of an evaluation: in the evaluated run, else a new one under outputs/."""
    return _folder_in(run, "evaluation", "evaluate")


def _study_folder(run: str | int | None) -> str:
    """Directory of a study: in the run whose policy it is of, else a new one under outputs/."""
    return _folder_in(run, "study", "study")


def register() -> None:
    """Register the resolvers with OmegaConf; this must precede the composition of a configuration."""
    OmegaConf.register_new_resolver("shipped", shipped, replace=True)
    OmegaConf.register_new_resolver("quotient", quotient, replace=True)
    OmegaConf.register_new_resolver("evaluation_folder", _evaluation_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("study_folder", _study_folder, replace=True, use_cache=True)

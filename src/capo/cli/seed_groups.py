"""Find runs that differ in their training seed alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from capo.runtime.run_folder import CONFIG, EVALUATION, RATES

OWN = ("run_dir", "hydra", "threads", "seed")  # keys that differ between runs of one setting


def seed_groups(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Group evaluated runs that have the same configuration but for the seed; groups of two or more.

    Returns:
        The names of a group's directories, joined by commas -> the directories.
    """
    groups: dict[str, list[Path]] = {}
    for folder in folders:
        if (folder / CONFIG).is_file() and (folder / EVALUATION / RATES).is_file():
            groups.setdefault(_setting(folder), []).append(folder)
    return {", ".join(folder.name for folder in group): group for group in groups.values() if len(group) > 1}


def _setting(folder: Path) -> str:
    """What a run was configured with, as text, without its seed and place."""
    values = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    assert isinstance(values, dict)  # a run's configuration is a mapping
    if adapter := values["model"].get("lora"):
        adapter.pop("seed", None)  # by default the run's own
    return json.dumps({key: value for key, value in values.items() if key not in OWN}, sort_keys=True)

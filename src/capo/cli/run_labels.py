"""Say in a few words what a run was configured with, and find runs that differ in their seed alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capo.cli.run_config import WRITER
from capo.cli.yaml_files import read_yaml
from capo.runtime.run_folder import CONFIG, EVALUATION, OUTCOME, RATES, read_outcome

OWN = ("run_dir", "hydra", "logger", "threads", "seed")  # keys that differ between runs of one setting
ALWAYS = ("objective", "pairs")  # columns of a table that stand also where all runs share them


def read_values(folder: Path) -> dict[str, Any]:
    """Read a run's config.yaml as plain values; empty if there is none.

    Raises InputError if it cannot be read.
    """
    try:
        values = read_yaml(folder / CONFIG, dict, "restore it, or leave the run out")
    except FileNotFoundError:
        return {}
    return {str(key): value for key, value in values.items()}


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the values below a key; none where the file has no such key, or something else there."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def seed_groups(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Group evaluated runs that have the same configuration but for the seed; groups of two or more.

    Of runs with the same seed, such as a run and its copy, the first counts.

    Returns:
        The names of a group's directories, joined by commas -> the directories.
    """
    groups: dict[str, dict[str, Path]] = {}
    for folder in folders:
        if (folder / CONFIG).is_file() and (folder / EVALUATION / RATES).is_file():
            values, merged = read_values(folder), _merged(folder)
            seed = f"{merged['soup']}" if merged else f"{values.get('seed')}"
            groups.setdefault(_setting(values, merged), {}).setdefault(seed, folder)
    named = [list(group.values()) for group in groups.values() if len(group) > 1]
    return {", ".join(folder.name for folder in group): group for group in named}


def _merged(folder: Path) -> Mapping[str, Any]:
    """Names of the runs that a soup was merged from, and the method; empty for a run that was trained."""
    outcome = read_outcome(folder) if (folder / OUTCOME).is_file() else {}
    return outcome if isinstance(outcome.get("soup"), list) else {}


def _setting(values: Mapping[str, Any], merged: Mapping[str, Any]) -> str:
    """What a run was configured with, as text, without its seed and place.

    A soup holds the configuration of the first run that it was `merged` from.
    """
    kept = {key: value for key, value in values.items() if key not in OWN}
    model = _part(kept, "model")
    kept[WRITER] = {key: value for key, value in _part(values, WRITER).items() if key != "run"}
    if adapter := _part(model, "lora"):
        kept["model"] = {**model, "lora": {**adapter, "seed": None}}  # by default the run's own
    if merged:
        kept["soup"] = {"of": len(merged["soup"]), "method": merged.get("method")}
    return json.dumps(kept, sort_keys=True)


def run_labels(folders: Sequence[Path]) -> list[dict[str, str]]:
    """Labels of runs, column -> text: objective and pairs, and what else differs between them.

    A directory without a configuration, as that of a soup, is labeled by its name.
    """
    found = [_labels(folder) for folder in folders]
    names = list(dict.fromkeys(name for labels in found for name in labels))
    kept = [
        name
        for name in names
        if name in ALWAYS or len({labels[name] for labels in found if name in labels}) > 1
    ]
    return [{name: labels.get(name, "") for name in kept} for labels in found]


def _labels(folder: Path) -> dict[str, str]:
    values = read_values(folder)
    if not values:
        return {"objective": folder.name}
    if merged := _merged(folder):
        return {"objective": f"soup of {', '.join(map(str, merged['soup']))}"}
    noise = _part(values, "noise")
    weighting = str(noise.get("weighting", ""))
    return {
        "model": str(_part(values, "model").get("name", "")),
        "objective": _target(_part(values, "objective")),
        "pairs": _target(_part(values, "pairs")),
        "rewards": ", ".join(map(str, _part(values, "rewards"))),
        "calibration": str(values.get("calibration", "")),
        "beta": str(_part(values, "objective").get("beta", "")),
        "weighting": weighting if weighting == "constant" else f"{weighting}, b = {noise.get('bias', '')}",
        "seed": str(values.get("seed", "")),
    }


def _target(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_", "")).rpartition(".")[2]

"""A run directory that is there already: what was configured, how far it came, whether a new start may go on from it."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo.atomic import write_whole
from capo.errors import InputError

CONFIG, OUTCOME = "config.yaml", "outcome.json"
# what may differ: where things lie, who watches, and what happens after training
FREE = ("run_dir", "logger", "data.workers", "pool.root", "evaluate", "export", "hydra")
MISSING = "(not there)"


class Progress(Enum):
    """How far the run in a directory has come."""

    NEW = "new"
    BEGUN = "begun"
    FINISHED = "finished"


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two configurations differ, FREE ones left out."""
    found = []
    for key in sorted(old.keys() | new.keys(), key=str):
        name = f"{prefix}{key}"
        if name in FREE:
            continue
        before, after = old.get(key, MISSING), new.get(key, MISSING)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: {before} -> {after}")
    return found


def open_run(folder: Path, cfg: DictConfig) -> Progress:
    """Begin, continue or recognise the run of `cfg` in `folder`; writes `config.yaml`.

    A larger `trainer.max_steps` continues a run, a finished one too. Raises InputError for a directory that holds another
    run, with the differences.
    """
    path = folder / CONFIG
    new = OmegaConf.to_container(cfg, resolve=True)
    progress = Progress.NEW
    if path.is_file():
        old = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        before, after = old["trainer"]["max_steps"], new["trainer"]["max_steps"]
        longer = isinstance(before, int) and isinstance(after, int) and after > before
        if longer:
            old["trainer"]["max_steps"] = after
        if found := differences(old, new):
            raise InputError(
                f"{folder} holds a run of another configuration:\n  " + "\n  ".join(found)
                + "\ngive the same values to go on with it, or another hydra.run.dir"
            )  # fmt: skip
        progress = Progress.FINISHED if (folder / OUTCOME).is_file() and not longer else Progress.BEGUN
        if longer:
            (folder / OUTCOME).unlink(missing_ok=True)
    write_whole(path, OmegaConf.to_yaml(cfg, resolve=True))
    return progress


def read_outcome(folder: Path) -> dict[str, object]:
    """What a finished run came to."""
    return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))


def write_outcome(folder: Path, outcome: dict[str, object]) -> None:
    """`outcome.json`: its presence says that training has finished."""
    write_whole(folder / OUTCOME, json.dumps(outcome, indent=2) + "\n")

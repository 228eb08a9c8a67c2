"""What the config.yaml of a run may not bring with it, since it may come from anywhere.

It calls code by registered names, or by those in `trust=[...]` (`capo.cli.targets`). What acts outside the
run is taken from the command line alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from capo.cli.marks import MARKS, TARGET
from capo.cli.targets import REWARDS, calls, find, place_of
from capo.cli.yaml_files import value_at
from capo.errors import InputError
from capo.runtime.schema import dotted, leaves, shown

# where results are sent, where a run is tracked, which machines work, and how it is started
OUTSIDE = ("push_to_hub", "logger", "engine", "hydra")
ROOT = "pool.root"


def check_foreign(folder: Path, stored: Mapping[str, Any], trust: Sequence[str], key: str = "trust") -> None:
    """Raise InputError if the configuration of the run in `folder` asks for what it may not.

    Args:
        folder: the run directory, for the message.
        stored: its configuration, unresolved, without what the command line replaces.
        trust: names of targets, interpreters and modules that the command line allows, exactly as they stand.
        key: where the command line gives them.
    """
    if fault := next(_unusable(stored), None):
        raise InputError(
            f"run={folder}: its config.yaml has {fault}; if it is to be so, give that key on the command line"
        )
    if fault := next(_of_no_use(stored), None):
        raise InputError(
            f"run={folder}: its config.yaml has {fault}, so it is not as train.py wrote it; restore it, or "
            "leave the run out"
        )
    unknown = dict(_untrusted(stored, trust))
    if unknown:
        calls_them = ", ".join(f"{key}={name}" for key, name in unknown.items())
        names = ",".join(dict.fromkeys(unknown.values()))
        raise InputError(
            f"run={folder}: its config.yaml calls {calls_them}; if you trust that code, add '{key}=[{names}]'"
        )


def _unusable(stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield `key=value, which ...` for what no trust allows."""
    for path, value in leaves(stored):
        if isinstance(value, str) and "${" in value:
            yield f"{dotted(path)}={value}, which is not resolved, as train.py writes it"
    for path, node in calls(stored):
        place = place_of(path)
        for mark in MARKS:
            if mark in node and (
                place is None or (mark != TARGET and node[mark] not in place.marks.get(mark, ()))
            ):
                what = "where nothing is called" if place is None else "which changes how it is called"
                yield f"{dotted(path)}.{mark}={shown(node[mark])}, {what}"


def _of_no_use(stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield `key=name, which ...` for names below capo. that stand for nothing which a place can call."""
    for path, node in calls(stored):
        place, name = place_of(path), node.get(TARGET)
        if place and str(name).startswith("capo.") and place.registered(name) is None:
            try:
                find(place, name)
            except (ImportError, AttributeError) as error:
                yield f"{dotted(path)}.{TARGET}={name}, which cannot be used ({error})"


def _untrusted(stored: Mapping[str, Any], trust: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, name) of code that would be called or imported, and of programs that would be started."""
    for path, node in calls(stored):
        place, name = place_of(path), node.get(TARGET)
        found = place and place.registered(name)
        if place and found is None and name not in trust:
            yield f"{dotted(path)}.{TARGET}", str(name)
        known = getattr(found, "known_weights", None)  # of a scorer whose weights can act
        if known is not None and (weights := node.get("weights")) not in (*known, *trust):
            yield f"{dotted(path)}.weights", str(weights)
    for place in REWARDS:
        own = value_at(stored, place.split("."))
        for reward, entry in own.items() if isinstance(own, Mapping) else ():
            if not isinstance(entry, Mapping):
                continue
            if (python := entry.get("python")) and python not in trust:
                yield f"{place}.{reward}.python", str(python)
            requires = entry.get("requires")
            for module in requires if isinstance(requires, list) else ():
                # a dotted name is looked for in its package, which is imported for that
                if "." in str(module) and module not in trust:
                    yield f"{place}.{reward}.requires", str(module)


def without_outside(own: DictConfig, cfg: DictConfig, folder: Path, given: Sequence[str]) -> None:
    """Put the command line's values in place of what acts outside the run of `own`, in `folder`.

    `given` are the keys of the command line. Raises InputError for a root of pools that it does not name and
    that is another than it would use.
    """
    for key in OUTSIDE:
        own.pop(key, None)
        if key in cfg:
            OmegaConf.update(own, key, cfg[key], merge=False, force_add=True)
    own.run_dir = str(folder)
    root, here = OmegaConf.select(own, ROOT), cfg.pool.root
    if ROOT not in given and root != here and Path(str(root)).absolute() != Path(here).absolute():
        raise InputError(
            f"run={folder}: its config.yaml has {ROOT}={root}, where images would be written; give the root "
            f"on the command line: {ROOT}={root} for the same one, or {ROOT}={here}"
        )

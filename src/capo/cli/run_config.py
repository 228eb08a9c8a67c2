"""Read the configuration of an existing run directory, and decide whether training may resume there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

from capo.cli.foreign import OUTSIDE, check_foreign, without_outside
from capo.cli.run_changes import (
    AGAIN,
    EXPORT,
    check_same_export,
    check_tuned,
    compared,
    differences,
    given_keys,
)
from capo.cli.schema import check_calls, check_stored
from capo.cli.values import plain
from capo.cli.yaml_files import read_yaml, value_at
from capo.errors import DamagedFile, InputError
from capo.runtime.files import check_inside, write_whole
from capo.runtime.run_folder import (
    BENCHMARKS,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    LAST,
    OUTCOME,
    POLICY,
    STUDY,
    last_remedy,
)
from capo.runtime.schema import shown
from capo.runtime.terminal import typed

LAYOUT = 3  # version of a run directory: its file names, and the keys of config.yaml
FILLED = (POLICY, EVALUATION, BENCHMARKS, STUDY)  # folders that are written to when a run has finished
REMEDY = "restore it, or choose another directory"  # for a config.yaml
WRITER = "written_by"  # key of config.yaml: the layout, and the version of this package
# keys that a run of an earlier version lacks, with the values that it had in effect
ADDED = {
    "selection": {"group": 2, "swap": False},
    "noise.source": "drawn",
    "noise.inversion": {"steps": 10, "renoise": 0, "eta": 0},
    "reference": {"decay": None, "interval": 1},
    "online": {"every": None, "prompts": None, "keep": False},
}
DEPTH = "pairs.depth"  # added likewise, to pairs=frs
VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,50}")  # it becomes a part of a command in a message
# keys of an evaluation, which a run does not have
ASKING = ("run", "runs", "policy", "base", "benchmark", "results", "trust", "study")


class Progress(Enum):
    """Progress of the run in a directory: not there yet, begun, or finished."""

    NEW = "new"
    BEGUN = "begun"
    FINISHED = "finished"


def read_config(folder: Path) -> DictConfig:
    """Read the configuration of the run in `folder`; InputError if it is unreadable or of another layout."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[DictConfig, str]:
    """Read the configuration, and the version of this package that wrote it."""
    path, here = folder / CONFIG, version("capo")
    try:
        cfg = OmegaConf.create(read_yaml(path, dict, REMEDY))
        # a file without the key has this layout
        writer = cfg.pop(WRITER, default={"layout": LAYOUT, "capo": here})
        layout, capo = writer["layout"], writer["capo"]
        steps = OmegaConf.select(cfg, "trainer.max_steps")
    except FileNotFoundError as error:
        raise DamagedFile(path, "it is not there", REMEDY) from error
    except (OmegaConfBaseException, KeyError, TypeError) as error:
        raise DamagedFile(path, str(error), REMEDY) from error
    if type(layout) is not int:
        raise DamagedFile(path, f"{WRITER}.layout is {layout!r}, not a whole number", REMEDY)
    if not (isinstance(capo, str) and VERSION.fullmatch(capo)):
        raise DamagedFile(path, f"{WRITER}.capo is {shown(capo)}, not a version", REMEDY)
    if layout != LAYOUT:
        raise InputError(
            f"{folder} is a run of capo {capo} (layout {layout}); this is capo {here}, which reads layout "
            f"{LAYOUT}: use that version for it (pip install capo=={capo}), or train again in another "
            "hydra.run.dir; its policy is an ordinary diffusers folder (evaluate.py policy=FOLDER)"
        )
    if not isinstance(steps, int):
        raise InputError(
            f"{path} is no run's, since it has no trainer.max_steps; restore it, or choose another "
            "hydra.run.dir"
        )
    _complete(cfg)
    return cfg, capo


def _complete(cfg: DictConfig) -> None:
    """Add the keys that the version which wrote the configuration did not have."""
    added = {**ADDED, DEPTH: None} if str(OmegaConf.select(cfg, "pairs._target_")).endswith(".frs") else ADDED
    for key, value in added.items():
        above, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, above) if above else cfg
        if isinstance(node, DictConfig) and name not in node:
            OmegaConf.update(cfg, key, value, force_add=True)


def check_files(folder: Path) -> None:
    """Raise DamagedFile if something else stands where a run's configuration or outcome is a file."""
    for path in (folder / CONFIG, folder / OUTCOME):
        if path.exists() and not path.is_file():
            raise DamagedFile(path, "it is no ordinary file", REMEDY)


def open_run(folder: Path, cfg: DictConfig) -> Progress:
    """Start, resume or recognize the run of `cfg` in `folder`; return the progress.

    A larger `trainer.max_steps` resumes a run, even a finished one. Its files stay as they are until
    `begin_training`, so that what fails before leaves the run that was finished; for any other run
    `config.yaml` is written now. Raises InputError for a directory that holds a run of another configuration
    of which a step is saved, with the differences, and for a finished run whose last checkpoint, from which
    more steps go on, is gone.
    """
    new = plain(cfg)
    progress, longer = Progress.NEW, False
    saved = (folder / OUTCOME).is_file() or os.path.lexists(folder / CHECKPOINTS / LAST)
    if (folder / CONFIG).is_file():
        stored, capo = _read(folder)
        old = plain(stored)
        before, after = old["trainer"]["max_steps"], new["trainer"]["max_steps"]
        longer = _longer(before, after)
        if longer:
            old["trainer"]["max_steps"] = after
        found = differences(old, new)
        if found and not saved:  # it ended before its first step, maybe for one of these values
            (folder / CONFIG).unlink()
            _write(folder, cfg)
            return Progress.NEW
        if found:
            raise InputError(
                f"{folder} holds a run of another configuration"
                + ("" if capo == version("capo") else f", written by capo {capo}")
                + ":\n  "
                + "\n  ".join(found)
                + "\ngive the same values to resume it, or another hydra.run.dir"
            )
        if longer and (folder / OUTCOME).is_file():
            _check_last(folder, before, after)
        progress = Progress.FINISHED if (folder / OUTCOME).is_file() and not longer else Progress.BEGUN
        if progress is Progress.FINISHED:
            check_same_export(folder, old, new)
    if not longer:
        _write(folder, cfg)
    return progress


def _check_last(folder: Path, before: int, after: int) -> None:
    """Raise InputError if a finished run of `before` steps has no checkpoint to go on from."""
    last = folder / CHECKPOINTS / LAST
    if not os.path.lexists(last):
        raise InputError(
            f"trainer.max_steps={after}: {folder} holds a run that has finished with {before} steps, but "
            f"{last}, from which it would go on, is not there: {last_remedy(folder)}"
        )


def begin_training(folder: Path, cfg: DictConfig) -> None:
    """Let the run in `folder` be the unfinished one of `cfg`; what it resumes from has been checked."""
    (folder / OUTCOME).unlink(missing_ok=True)  # first: beside the new config.yaml it would stand for it
    _write(folder, cfg)


def run_id(folder: Path) -> str | None:
    """What tells the checkpoints of the run in `folder` from another run's, wherever it is moved.

    It is made from the configuration when the run begins. None without a run, and for one of an earlier
    version. Raises DamagedFile for a config.yaml that cannot be read.
    """
    try:
        written_by = read_yaml(folder / CONFIG, dict, REMEDY).get(WRITER)
    except FileNotFoundError:
        return None
    found = written_by.get("run") if isinstance(written_by, dict) else None
    return found if isinstance(found, str) else None


def _write(folder: Path, cfg: DictConfig) -> None:
    from capo.runtime.fingerprints import content_fingerprint  # with torch, which a slip need not wait for

    own = run_id(folder) or content_fingerprint(compared(plain(cfg)))
    written_by = OmegaConf.to_yaml({WRITER: {"layout": LAYOUT, "capo": version("capo"), "run": own}})
    write_whole(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True) + written_by)


def note_export(folder: Path, cfg: DictConfig) -> None:
    """Write the form in which the policy of a finished run was exported again into its configuration."""
    own = read_config(folder)
    for key in EXPORT:
        own[key] = cfg[key]
    _write(folder, own)


def is_finished(folder: Path, cfg: DictConfig) -> bool:
    """Whether `folder` holds a run that has trained for as many steps as `cfg` asks for."""
    if not (folder / OUTCOME).is_file():
        return False
    before, after = read_config(folder).trainer.max_steps, cfg.trainer.max_steps
    return not _longer(before, after)


def _longer(before: object, after: object) -> bool:
    """Whether `after` asks for more steps than `before`; a value that is no number of steps does not."""
    return isinstance(before, int) and isinstance(after, int) and after > before


def run_config(folder: Path, cfg: DictConfig, overrides: Sequence[str], exports: bool = False) -> DictConfig:
    """Configuration of a finished run, in which the keys of `overrides` have their values from `cfg`.

    What acts outside the run has its values from `cfg` too (`capo.cli.foreign`). `exports`: whether the
    strength of the policy is chosen anew, as `validation` says, and the policy exported.

    Raises InputError for a folder that is not a run directory, a run that has not finished, a run whose
    config asks for what it may not, one of which a folder that is written to leads elsewhere, and for what
    `check_tuned` refuses.
    """
    check_files(folder)
    if not (folder / CONFIG).is_file():
        policy = folder / POLICY
        remedy = "the directory that train.py printed"
        if (folder.parent / CONFIG).is_file():
            remedy = typed("run", folder.parent)
        elif policy.is_dir():
            remedy = f"{typed('policy', policy)} instead"
        raise InputError(f"run={folder} is not a run directory: it has no config.yaml; give {remedy}")
    check_inside(folder, FILLED, cfg.trust)
    own = read_config(folder)
    if not (folder / OUTCOME).is_file():
        raise InputError(
            f"run={folder} has not finished: it has no outcome.json; finish its training first, by "
            f"`python train.py ... {typed('hydra.run.dir', folder)}` with the values of its start"
        )
    given = given_keys(overrides)
    for override in overrides:
        if override.lstrip("+").startswith("experiment=") and not override.endswith("=null"):
            raise InputError(
                f"{override} beside run={folder}: a run is evaluated with its own configuration, of which no "
                "recipe takes the place; give the single values that are to differ"
            )
    tuned = OmegaConf.select(own, "model.name")
    if "model" in given and cfg.model.name != tuned:
        raise InputError(
            f"model={cfg.model.name} beside run={folder}: the run tuned {tuned}, whose policy no "
            "other model can draw; leave model out"
        )
    keys = [key for key in given if key.split(".")[0] not in ASKING and not key.startswith("hydra")]
    kept = f"its policy is taken as it is; to export it anew: evaluate.py {typed('run', folder)} {AGAIN}"
    check_tuned(overrides, f"run={folder}", kept, exports)
    stored = without(own, [*OUTSIDE, *keys])
    check_foreign(folder, stored, cfg.trust)
    check_stored(stored, f"run={folder}: its config.yaml")
    without_outside(own, cfg, folder, given)
    for key in keys:
        OmegaConf.update(own, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    check_calls(plain(own))
    return own


@contextmanager
def complete(folder: Path) -> Iterator[None]:
    """InputError for a key that the configuration of the run in `folder` lacks."""
    try:
        yield
    except ConfigAttributeError as error:
        raise InputError(
            f"run={folder}: its config.yaml has no {error.full_key}; restore it, or give that key on the "
            "command line"
        ) from error


def without(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Return the configuration as plain values, unresolved, without the values of these dotted keys."""
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    for key in keys:
        *above, name = key.split(".")
        node = value_at(values, above)
        if isinstance(node, dict):
            node.pop(name, None)
    return values

"""Refuse output directories of something else, and links in them through which files would be elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from capo.cli.run_config import FILLED, check_files, read_config
from capo.errors import DamagedFile, InputError
from capo.evaluation.stored import Results
from capo.runtime.files import check_inside, led_to, refuse_links
from capo.runtime.run_folder import (
    CHECK,
    CONFIG,
    OUTCOME,
    PLAN,
    PLANS,
    REPORT,
    RESULTS,
    SAMPLES,
    SETTINGS,
    STATUS,
    SWEEP,
    TABLES,
    TRAINED,
    WORKERS,
    WRITTEN,
)
from capo.runtime.stored import read_record
from capo.runtime.terminal import typed

MULTIRUN = "multirun.yaml"  # of Hydra, in the directory of a sweep
# files by which a folder of something else is known, in which no run is made
OTHERS = {
    "model_index.json": "a pipeline",
    "pytorch_lora_weights.safetensors": "an adapter",
    "manifest.json": "a pool",
}
# what a script writes beside the files of a run, and a sweep at its end
MADE = {"train": (PLAN, CHECK), "generate": (STATUS,), "evaluate": TABLES}
MADE_OF_JOBS = (*SWEEP, PLANS)


def check_output(config: DictConfig) -> None:
    """Raise InputError if what any command writes, or folders of the run that it names, lead elsewhere.

    So it does for an output directory that is the folder of a pool, a pipeline or an adapter.

    `config` is composed, but its values are not yet checked: what is no path is left to the check of values.
    """
    if run := OmegaConf.select(config, "run"):
        trust = OmegaConf.select(config, "trust")
        check_inside(Path(str(run)), FILLED, list(map(str, trust)) if isinstance(trust, ListConfig) else ())
    if (folder := _folder(config, "hydra.run.dir")) is not None:
        _refuse_others(folder, typed("hydra.run.dir", folder))
        refuse_links(folder, _written(folder, config))
        if config.hydra.output_subdir:
            records = (config.hydra.output_subdir, CONFIG)  # a copy of a run may lack the former
            _refuse_own(folder, MADE.get(config.hydra.job.name, ()), records, "hydra.run.dir")


def check_sweep_output(config: DictConfig) -> None:
    """Raise InputError if such files of a sweep, or of a job that its directory holds, lead elsewhere.

    So it does for a directory that is that of a run, or the folder of a pool, a pipeline or an adapter.
    """
    if (folder := _folder(config, "hydra.sweep.dir")) is not None:
        given = typed("hydra.sweep.dir", folder)
        if (folder / CONFIG).is_file() and not (folder / MULTIRUN).is_file():
            raise InputError(f"{given} is the directory of a run ({CONFIG}): choose another one")
        _refuse_others(folder, given)
        jobs = [place for place in sorted(folder.glob("*")) if place.is_dir()]
        own = [place for job in jobs for place in (job, *_written(job, config))]
        refuse_links(folder, [folder / MULTIRUN, *own])
        _refuse_own(folder, MADE_OF_JOBS, [MULTIRUN], "hydra.sweep.dir")


def _refuse_own(folder: Path, names: Sequence[str], records: Sequence[str], key: str) -> None:
    """Raise InputError for files of these names where no record tells of a command that made them."""
    held = [name for name in names if os.path.lexists(folder / name)]
    if held and not any((folder / record).exists() for record in records):
        raise InputError(
            f"{typed(key, folder)} holds files that this command may replace, and that no command was "
            f"started there to make: move {', '.join(held)} away, or choose another one"
        )


def _folder(config: DictConfig, key: str) -> Path | None:
    given = OmegaConf.select(config, key, throw_on_resolution_failure=False)
    return Path(given) if isinstance(given, str) else None


def _written(folder: Path, config: DictConfig) -> list[Path]:
    """What any command may write in an output directory: Hydra's configuration, logs, pictures of a check."""
    settings = folder / (config.hydra.output_subdir or ".")
    places = [(settings, "*.yaml"), (folder / WORKERS, "*"), (folder / SAMPLES, "*")]
    held = [path for place, names in places if not place.is_symlink() for path in sorted(place.glob(names))]
    return [*(place for place, _ in places), *held, folder / f"{config.hydra.job.name}.log"]


def _refuse_others(folder: Path, given: str) -> None:
    """Raise InputError if `folder`, `given` on the command line, is that of something else."""
    found = next((name for name in OTHERS if (folder / name).is_file()), None)
    if found and not (folder / CONFIG).is_file():
        raise InputError(f"{given} is the folder of {OTHERS[found]} ({found}): choose another one")


def check_place(folder: Path) -> None:
    """Raise InputError if `folder` holds what a run would replace but no run, or one that writes outside."""
    _check_free(folder)
    check_inside(folder, TRAINED)
    if other := next((path for path in (folder / name for name in TRAINED) if path.is_file()), None):
        raise InputError(f"{other} is a file, but a run has a folder of this name: move it away")
    check_files(folder)
    if (folder / CONFIG).exists():
        read_config(folder)
    elif held := [name for name in WRITTEN if os.path.lexists(folder / name)]:
        raise InputError(
            f"{folder} has no config.yaml of a run, but holds {', '.join(held)}, which a run would replace: "
            f"move {'it' if len(held) == 1 else 'them'} away, or choose another hydra.run.dir"
        )


def _check_free(folder: Path) -> None:
    """Raise InputError for the folder of something else, and for one that a run about it writes anew."""
    given = typed("hydra.run.dir", folder)
    if (folder / MULTIRUN).is_file() and not (folder / CONFIG).is_file():
        raise InputError(f"{given} is the folder of a sweep, whose jobs have their own: choose another one")
    place = led_to(folder)
    for inner, outer in zip((place, *place.parents), place.parents, strict=False):
        if inner.name in {*TRAINED, *FILLED} and (outer / CONFIG).is_file() and (outer / OUTCOME).is_file():
            raise InputError(
                f"{given} is in {inner.name}/ of the run {outer}, which is written anew by that run: choose "
                f"another one, or {typed('hydra.run.dir', outer)} for that run"
            )


def check_results(folder: Path) -> None:
    """Raise InputError if `folder` holds files that an evaluation would replace, but no evaluation."""
    held = [name for name in (RESULTS, REPORT, SETTINGS) if os.path.lexists(folder / name)]
    try:
        if held:
            read_record(folder / RESULTS, Results, "move it away")
    except (FileNotFoundError, DamagedFile) as error:
        raise InputError(
            f"{folder} holds {', '.join(held)}, but no results of an evaluation: move "
            f"{'it' if len(held) == 1 else 'them'} away, or choose another hydra.run.dir"
        ) from error

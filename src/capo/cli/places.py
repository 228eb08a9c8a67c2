"""Refuse links in output directories, through which files of a command would be written elsewhere."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from capo.cli.run_config import FILLED
from capo.runtime.files import check_inside, refuse_links
from capo.runtime.run_folder import SAMPLES, WORKERS

MULTIRUN = "multirun.yaml"  # of Hydra, in the directory of a sweep


def check_output(config: DictConfig) -> None:
    """Raise InputError if files that any command writes, or folders of the run that it names, lead elsewhere.

    `config` is composed, but its values are not yet checked: what is no path is left to the check of values.
    """
    if run := OmegaConf.select(config, "run"):
        trust = OmegaConf.select(config, "trust")
        check_inside(Path(str(run)), FILLED, list(map(str, trust)) if isinstance(trust, ListConfig) else ())
    if (folder := _folder(config, "hydra.run.dir")) is not None:
        refuse_links(folder, _written(folder, config))


def check_sweep_output(config: DictConfig) -> None:
    """Raise InputError if such files of a sweep, or of a job that its directory holds, lead elsewhere."""
    if (folder := _folder(config, "hydra.sweep.dir")) is not None:
        jobs = [place for place in sorted(folder.glob("*")) if place.is_dir()]
        own = [place for job in jobs for place in (job, *_written(job, config))]
        refuse_links(folder, [folder / MULTIRUN, *own])


def _folder(config: DictConfig, key: str) -> Path | None:
    given = OmegaConf.select(config, key, throw_on_resolution_failure=False)
    return Path(given) if isinstance(given, str) else None


def _written(folder: Path, config: DictConfig) -> list[Path]:
    """What any command may write in an output directory: Hydra's configuration, logs, pictures of a check."""
    settings = folder / (config.hydra.output_subdir or ".")
    places = [(settings, "*.yaml"), (folder / WORKERS, "*"), (folder / SAMPLES, "*")]
    held = [path for place, names in places if not place.is_symlink() for path in sorted(place.glob(names))]
    return [*(place for place, _ in places), *held, folder / f"{config.hydra.job.name}.log"]

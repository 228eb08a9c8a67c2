"""Merge the policies of a sweep's jobs that were tuned on one reward each: the row SOUP of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from omegaconf import DictConfig, OmegaConf

from capo.cli.foreign import OUTSIDE, ROOT, check_foreign, leaves
from capo.cli.merge import soup_of
from capo.cli.run_config import without
from capo.cli.run_labels import read_values
from capo.cli.sweep import Job, read_jobs, run_job
from capo.errors import InputError
from capo.runtime.files import write_whole
from capo.runtime.run_folder import CONFIG, POLICY, write_outcome
from capo.runtime.terminal import printable

TRUST = "hydra.callbacks.soup.trust"  # key of the command line
REWARDS = "rewards"  # the key that the jobs of a soup differ in
SOUP = "soup-"  # begins the name of a soup's directory; the number of its first job follows


def add_soups(sweep: Path, method: str, config: DictConfig, trust: Sequence[str] = ()) -> list[Path]:
    """Merge and evaluate one soup for each set of jobs that differ in their single reward alone.

    A soup's directory lies beside those of the jobs, and is reported like one, also where it fails. Sets with
    a job that is not finished are left out, and said. Returns the soups' directories.

    Directories of jobs may come from anywhere: their config.yaml calls registered names (`capo.cli.foreign`),
    names that stand in the multirun's own `config`, and those of `trust`.
    """
    own = leaves(without(config, ["hydra"]))
    allowed = [*trust, *(value for _, value in own if isinstance(value, str)), *_swept(config, ROOT)]
    made = []
    for jobs in single_reward_jobs(read_jobs(sweep)):
        if unfinished := [job.name for job in jobs if not job.done]:
            print(printable(f"no soup of jobs {_names(jobs)}: not finished: {', '.join(unfinished)}"))
            continue
        folder = sweep / f"{SOUP}{jobs[0].name}"
        told = {**jobs[0].overrides, REWARDS: f"soup of jobs {_names(jobs)}"}
        write_whole(folder / ".hydra" / "overrides.yaml", json.dumps([f"{k}={v}" for k, v in told.items()]))
        run_job(partial(_add_soup, jobs, method, folder, allowed), folder)
        made.append(folder)
    return made


def _add_soup(jobs: Sequence[Job], method: str, folder: Path, allowed: Sequence[str]) -> float:
    cfg, first = _config(jobs[0]), jobs[0].folder
    check_foreign(first, without(cfg, OUTSIDE), allowed, TRUST)
    if (root := OmegaConf.select(cfg, ROOT)) not in allowed:
        raise InputError(f"run={first}: its config.yaml has {ROOT}={root}, which this command does not name")
    write_whole(folder / CONFIG, OmegaConf.to_yaml(cfg))
    soup_of(cfg, [job.folder / POLICY for job in jobs], method, None, folder)
    write_outcome(folder, {"soup": [job.name for job in jobs], "method": method})
    return math.nan  # no validation has seen it


def _swept(config: DictConfig, key: str) -> list[str]:
    """Values of `key` over which the multirun goes; its `config` has none of them at their key."""
    given = list(OmegaConf.select(config, "hydra.overrides.task") or [])
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    given += [f"{name}={values}" for name, values in params.items()]
    return [
        str(getattr(value, "text", value))  # of a quoted one
        for override in OverridesParser.create().parse_overrides(given)
        if override.key_or_group == key and override.is_sweep_override()
        for value in override.sweep_iterator(Transformer.identity)
    ]


def single_reward_jobs(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group jobs that were tuned on one reward each by their other overrides; groups of two or more.

    A job that failed before it wrote what it was configured with is in its group too.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        written = (job.folder / CONFIG).is_file()
        if not job.name.startswith(SOUP) and (not written or len(_config(job).get(REWARDS) or []) == 1):
            groups.setdefault(_others(job.overrides), []).append(job)
    return [group for group in groups.values() if len(group) > 1]


def _config(job: Job) -> DictConfig:
    """Configuration of a job; an empty one where it is missing or damaged, which names no reward."""
    try:
        return OmegaConf.create(read_values(job.folder))
    except InputError:
        return OmegaConf.create({})


def _others(overrides: Mapping[str, str]) -> str:
    return json.dumps({key: value for key, value in sorted(overrides.items()) if key != REWARDS})


def _names(jobs: Sequence[Job]) -> str:
    return ", ".join(job.name for job in jobs)

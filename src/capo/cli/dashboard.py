"""Make the W&B workspace and the report in which a sweep is read (docs/sweeps.md).

    python -m capo.cli.dashboard multirun/DATE/TIME
    python -m capo.cli.dashboard multirun/DATE/TIME --entity TEAM

Without a key of W&B, only the specification is written.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capo.cli.messages import refused
from capo.cli.sweep import Job, read_jobs, sweep_name, sweep_rows, varying_keys
from capo.errors import DamagedFile, InputError
from capo.evaluation.reports.dashboard import Tracked, TrackedRun, markdown_table, specification
from capo.runtime.files import check_ordinary, write_json
from capo.runtime.reading import read_json, read_text
from capo.runtime.run_folder import CONFIG, METRICS, VALIDATION
from capo.runtime.terminal import printable
from capo.training.wandb_run import ONLINE, wandb_mode

PROJECT = "capo"  # of conf/logger/wandb.yaml
FILE, RECORD = "dashboard.json", "wandb.json"
LOGGER = "wandb_logger"  # ends the name of the target that logs to W&B
REMEDY = "restore it, or move the job away"
HIDDEN = ("error",)  # columns of sweep.csv that the report's table leaves out


def tracked_sweep(folder: Path, jobs: Sequence[Job]) -> Tracked:
    """Read what W&B holds of a sweep from its jobs' directories.

    Raises InputError if no job was logged to W&B, a record cannot be read, or jobs do not share one group of
    one project.
    """
    if not jobs:
        remedy = "give one that -m has made"
        if (folder / CONFIG).is_file():  # of a job
            remedy = f"give {folder.absolute().parent}, if that is its sweep"
        raise InputError(f"{folder} is not the directory of a sweep, since it holds no job; {remedy}")
    logged = [job for job in jobs if (job.folder / RECORD).is_file()]
    if not logged:
        raise InputError(
            f"{folder}: none of its {len(jobs)} jobs was logged to W&B (no {RECORD}); run the sweep with "
            "logger=wandb, which needs no key"
        )
    records = [_record(job.folder) for job in logged]
    places = sorted({_place(record) for record in records}, key=str)
    entity, project, group = places[0]
    if len(places) > 1 or group is None:
        told = "; ".join(f"{entity or 'own'}/{project}, group {group}" for entity, project, group in places)
        raise InputError(
            f"{folder}: its jobs went to {told} of W&B; a dashboard is of one group in one project, as a "
            "multirun makes it"
        )
    runs = [
        TrackedRun(
            record["id"],
            record["config"],
            record["summary"],
            _curves(job.folder / METRICS),
            any((job.folder / VALIDATION).glob("*.png")),
        )
        for job, record in zip(logged, records, strict=True)
    ]
    return Tracked(sweep_name(folder), project, group, runs, entity, tuple(varying_keys(logged)))


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    record = read_json(path, REMEDY)
    try:
        if not isinstance(record["id"], str) or not all(
            isinstance(record[name], dict) for name in ("config", "summary")
        ):
            raise TypeError("id, config or summary is of another kind")
        if not all(place is None or isinstance(place, str) for place in _place(record)):
            raise TypeError("the logger's entity or project is no text")
        return record
    except (KeyError, TypeError) as error:
        raise DamagedFile(path, repr(error), REMEDY) from error


def _place(record: Mapping[str, Any]) -> tuple[str | None, str, str | None]:
    """Entity, project and group to which a run was logged: its logger's, else those of its record."""
    run = record["config"].get("run")
    loggers = run.get("logger") if isinstance(run, Mapping) else None
    options = next(
        (
            logger
            for logger in (loggers.values() if isinstance(loggers, Mapping) else ())
            if isinstance(logger, dict) and str(logger.get("_target_")).endswith(LOGGER)
        ),
        {},
    )
    group = options.get("group", record.get("group"))
    return options.get("entity"), options.get("project", "None"), None if group is None else str(group)


def _curves(path: Path) -> frozenset[str]:
    """Names of a run's curves: the columns of metrics.csv, which W&B is given too."""
    if not path.is_file():
        return frozenset()
    first = read_text(path, REMEDY).splitlines()[:1]
    return frozenset(next(csv.reader(first), [])) - {"step"}


def apply(spec: Mapping[str, Any], entity: str | None) -> list[str]:
    """Make the views and the report in W&B; return their addresses.

    Raises InputError if the package wandb-workspaces is not installed.
    """
    try:
        from capo.cli.dashboard_panels import report_of, workspaces_of
    except ImportError as error:
        raise InputError(
            f"a workspace needs the package wandb-workspaces ({error}): pip install -e '.[dashboard]'; the "
            "specification is written"
        ) from error
    if entity is None:
        import wandb

        entity = wandb.Api().default_entity
    if entity is None:
        raise InputError("the key of W&B has no default entity; give --entity NAME")
    made = [workspace.save().url for workspace in workspaces_of(spec, entity)]
    return [*made, report_of(spec, entity).save().url]


def check_place(tracked: Tracked, entity: str | None, project: str | None) -> None:
    """Raise InputError unless the command line says where the report goes; records may come from elsewhere.

    Without `entity` it goes to the key's own, and without `project` to the project of this package's file.
    """
    where = f"{tracked.entity or 'own'}/{tracked.project}"
    if project not in (None, tracked.project):
        raise InputError(
            f"--project {project}: the jobs of this sweep went to {where} of W&B, where alone a dashboard "
            f"finds them; give --project {tracked.project}"
        )
    asked = {"entity": entity or tracked.entity, "project": project or tracked.project}
    given = {"entity": entity or None, "project": project or PROJECT}
    if lacking := [f"--{name} {value}" for name, value in asked.items() if value != given[name]]:
        raise InputError(
            f"the records of this sweep name {where} of W&B, to which its table would be sent: if that is "
            f"where it should go, add {' '.join(lacking)}"
        )


def check_target(path: Path) -> None:
    """Raise InputError for a file at `path` that is no specification, and would be replaced."""
    check_ordinary(path, "--to")
    remedy = "no dashboard wrote it, so it is not replaced: move it away, or give another name (--to FILE)"
    if path.exists() and "views" not in read_json(path, remedy):
        raise DamagedFile(path, "it has no views", remedy)


def main(command: Sequence[str] | None = None) -> int:
    """Write a sweep's specification, and apply it where a key is found; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m capo.cli.dashboard", description="Make the W&B workspace in which a sweep is read."
    )
    parser.add_argument("sweep", type=Path, help="directory of a sweep whose jobs had logger=wandb")
    parser.add_argument("--entity", help="team or user of W&B; by default the key's own")
    parser.add_argument("--project", help=f"project of the runs; needed where it is not {PROJECT}")
    parser.add_argument("--to", type=Path, help=f"file of the specification; by default SWEEP/{FILE}")
    options = parser.parse_args(command)
    try:
        if not options.sweep.is_dir():
            raise InputError(f"{options.sweep}: no such folder; give the directory of a sweep")
        jobs = read_jobs(options.sweep)
        tracked = tracked_sweep(options.sweep, jobs)
        columns, rows = sweep_rows(jobs)
        table = markdown_table([name for name in columns if name not in HIDDEN], rows)
        spec = specification(tracked, table)
        path = options.to or options.sweep / FILE
        check_target(path)
        write_json(path, spec)
        print(printable(f"specification: {path}, {len(spec['views'])} views and a report"))
        if wandb_mode() != ONLINE:
            print(
                printable(
                    "no key of W&B, or WANDB_MODE=offline: nothing was sent. `wandb login`, then "
                    f"`wandb sync {options.sweep}/*/wandb/offline-*`, then this command again makes the "
                    "workspace"
                )
            )
            return 0
        check_place(tracked, options.entity, options.project)
        for address in apply(spec, options.entity):
            print(printable(address))
    except Exception as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

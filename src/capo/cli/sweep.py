"""Collect the results of a multirun's jobs into a table, a file, a picture and a page."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Column, Table

from capo.cli.figures import found_figures
from capo.cli.frontiers import SEED, compare_methods
from capo.cli.messages import told_fault, was_interrupted
from capo.cli.run_labels import seed_groups
from capo.cli.yaml_files import read_yaml
from capo.errors import InputError
from capo.evaluation.reports.frontiers import PICTURE as FRONTIER
from capo.evaluation.reports.sweep_page import (
    ORACLE,
    TEST,
    VALIDATION,
    ZERO,
    interval,
    moved,
    named,
    percent,
    render_page,
    setting_of,
    sweep_picture,
)
from capo.evaluation.seeds import seeds_table
from capo.preflight.plan_tables import HOLDS, TAKES, plan_cell, plan_figures
from capo.runtime.files import write_table, write_whole
from capo.runtime.reading import read_json, read_text
from capo.runtime.run_folder import CONFIG, ERROR, OUTCOME, PLAN, PLANS, SWEEP
from capo.runtime.terminal import Terminal, printable

FINISHED, PLANNED, FAILED, UNFINISHED = "finished", "planned", "failed", "unfinished"
TABLE, PICTURE, PAGE = SWEEP
EARLIER = "the results in this directory are those of an earlier start"  # last line of such an error.txt


def sweep_name(folder: Path) -> str:
    """Name of a sweep: its directory relative to the working directory, without a leading `multirun`."""
    folder = folder.absolute()
    parts = folder.relative_to(Path.cwd()).parts if folder.is_relative_to(Path.cwd()) else (folder.name,)
    return "/".join(parts[1:] if len(parts) > 1 and parts[0] == "multirun" else parts)


def run_job(task: Callable[[], float], folder: Path) -> float:
    """Return `task()`, or NaN if it fails, so that a sweep continues with its other jobs.

    The error is printed and written to `folder/error.txt`, which also says whether a run that had finished
    before, maybe with other values, is all that lies there.
    """
    (folder / ERROR).unlink(missing_ok=True)
    finished = _written(folder / OUTCOME)
    try:
        return task()
    except (Exception, SystemExit) as error:
        if was_interrupted(error):
            raise
        text = printable(told_fault(error) or "".join(traceback.format_exception(error))).rstrip()
        earlier = finished is not None and finished == _written(folder / OUTCOME)
        write_whole(folder / ERROR, f"{text}\n{EARLIER}\n" if earlier else f"{text}\n")
        print(f"error in {folder}: {text}", file=sys.stderr)
        return math.nan


def _written(path: Path) -> tuple[int, int] | None:
    """Which file stands at `path`, and when it was written; None without one."""
    status = path.stat() if path.is_file() else None
    return status and (status.st_ino, status.st_mtime_ns)


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its directory, command-line overrides, status, error and figures."""

    folder: Path
    overrides: Mapping[str, str]
    status: str
    error: str = ""
    figures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the job's directory, by default the job's number."""
        return self.folder.name

    @property
    def done(self) -> bool:
        """Whether the job has finished its run or plan."""
        return self.status in (FINISHED, PLANNED)


def _read_overrides(folder: Path) -> dict[str, str]:
    overrides: dict[str, str] = {}
    path = folder / ".hydra" / "overrides.yaml"
    for override in read_yaml(path, list, "restore it, or move the job's directory away"):
        key, _, value = str(override).partition("=")
        overrides[key.lstrip("+")] = value
    return overrides


def read_job(folder: Path) -> Job:
    """Read the result of a training job from its directory."""
    overrides = _read_overrides(folder)
    try:
        figures = found_figures(folder)
    except InputError as error:  # damaged files cost one row, not the table
        return Job(folder, overrides, FAILED, str(error))
    if (folder / ERROR).is_file():
        error, earlier = _error(folder)
        return Job(folder, overrides, FAILED, error, {} if earlier else figures)
    return Job(folder, overrides, FINISHED if (folder / OUTCOME).is_file() else UNFINISHED, figures=figures)


def read_plan(folder: Path) -> Job:
    """Read the result of a planning job from its directory."""
    overrides = _read_overrides(folder)
    if (folder / ERROR).is_file():  # a plan.json in the directory is then from an earlier start
        return Job(folder, overrides, FAILED, _error(folder)[0])
    plan = read_json(folder / PLAN, "remove it and plan again")
    return Job(folder, overrides, PLANNED, figures=plan_figures(plan))


def _error(folder: Path) -> tuple[str, bool]:
    """What ended a job, in one line, and whether results in its directory are those of an earlier start.

    The line is a message as it is, and of a traceback the last one.
    """
    text = read_text(folder / ERROR, "remove it, or run the job again")
    lines = [line.strip() for line in text.strip().splitlines()] or ["unknown"]
    earlier = lines[-1] == EARLIER
    lines = lines[: -1 if earlier else None] or ["unknown"]
    return lines[-1] if lines[0].startswith("Traceback") else " ".join(lines), earlier


def _job_folders(sweep: Path, mark: str) -> list[Path]:
    """Job directories with the file `mark` or an error, sorted so that 2 comes before 10."""
    folders = [path.parents[1] for path in sweep.glob("*/.hydra/overrides.yaml")]
    there = [folder for folder in folders if (folder / mark).is_file() or (folder / ERROR).is_file()]
    return sorted(there, key=lambda folder: (len(folder.name), folder.name))


def read_jobs(sweep: Path) -> list[Job]:
    """Read the training jobs in a sweep's directory, in order; jobs that were only planned are left out."""
    return [read_job(folder) for folder in _job_folders(sweep, CONFIG)]


def read_plans(sweep: Path) -> list[Job]:
    """Read the jobs of a sweep with `plan=true`, in order."""
    return [read_plan(folder) for folder in _job_folders(sweep, PLAN)]


def varying_keys(jobs: Sequence[Job]) -> list[str]:
    """Override keys whose values differ between jobs, in the order of the command line."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def sweep_rows(jobs: Sequence[Job]) -> tuple[list[str], list[dict[str, object]]]:
    """Columns and rows of `sweep.csv` or `plans.csv`: job, status, error, varying keys verbatim, figures."""
    keys = varying_keys(jobs)
    figures = list(dict.fromkeys(name for job in jobs for name in job.figures))
    rows: list[dict[str, object]] = [
        {
            "job": job.name,
            "status": job.status,
            "error": job.error,
            **{key: job.overrides.get(key, "") for key in keys},
            **{name: job.figures.get(name, "") for name in figures},
        }
        for job in jobs
    ]
    return ["job", "status", "error", *keys, *figures], rows


def console_tables(jobs: Sequence[Job], title: str) -> list[Table]:
    """Tables with one row per job: varying keys, and validation and test win-rates in % with intervals.

    Further tables hold zero lines and the oracle's measures, if there are any.
    """
    figures = [job.figures for job in jobs]
    rates = {"validation %": VALIDATION} | {
        f"{name} %": column for name, column in named(figures, TEST).items()
    }
    tables = [_job_table(jobs, rates, _rate, title)]
    if zero := named(figures, ZERO):
        tables.append(_job_table(jobs, zero, _rate, "zero line: base against base, %"))
    if measures := named(figures, ORACLE):
        tables.append(_job_table(jobs, measures, moved, "oracle, base → policy"))
    return tables


def _job_table(
    jobs: Sequence[Job], columns: Mapping[str, str], cell: Callable[[Mapping, str], str], title: str
) -> Table:
    """Table with one row per job, `columns` maps heading -> figure; a job not done shows its status."""
    keys = varying_keys(jobs)
    table = Table(
        "job",
        *(Column(key, overflow="fold", min_width=len(key)) for key in keys),
        title=title,
        box=box.SIMPLE_HEAD,
    )
    for head in columns:
        table.add_column(head, overflow="fold")  # a narrow console wraps figures instead of cutting them
    for job in jobs:
        given = [job.overrides.get(key, "") for key in keys]
        cells = [cell(job.figures, name) for name in columns.values()] if job.done else [job.status]
        table.add_row(job.name, *given, *cells, style="" if job.done else "red")
    return table


def _rate(figures: Mapping[str, float], name: str) -> str:
    rate, span = percent(figures, name), interval(figures, name)
    return f"{rate} ({span})" if span else rate


def plans_tables(jobs: Sequence[Job], title: str) -> list[Table]:
    """Tables with one row per planned job.

    The first shows varying keys, parameters, memory and disk, the second steps, images, hours and the number
    of shortages on this machine.
    """
    return [
        _job_table(jobs, HOLDS, plan_cell, title),
        _job_table(jobs, TAKES, plan_cell, "what it takes, and how much is missing here"),
    ]


def report_sweep(folder: Path, plans: bool) -> bool:
    """Write and print the results of a sweep's jobs, or their plans; returns whether all jobs are done."""
    jobs = read_plans(folder) if plans else read_jobs(folder)
    if not jobs:
        print(f"error: no job has begun in {folder}: give each swept key a value at least", file=sys.stderr)
        return False
    (write_plans if plans else write_runs)(folder, jobs)
    return all(job.done for job in jobs)


def write_runs(folder: Path, jobs: Sequence[Job]) -> None:
    """Write sweep.csv, sweep.png and sweep.html, and print the tables."""
    columns, rows = sweep_rows(jobs)
    keys = varying_keys(jobs)
    compared = compare_methods({job.folder: job.overrides for job in jobs if job.done})
    if compared:
        rows = [{**row, **compared.columns(job.folder)} for row, job in zip(rows, jobs, strict=True)]
        columns = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    write_table(folder / TABLE, columns, rows)
    picture = sweep_picture(rows, keys) if len(keys) == 1 or not compared else None
    if picture is not None:
        write_whole(folder / PICTURE, picture)
    drawn = compared.write(folder, FRONTIER if picture else PICTURE) if compared else []
    write_whole(folder / PAGE, render_page(str(folder), rows, keys, picture, compared))
    groups = _over_seeds([job for job in jobs if job.done], [key for key in keys if key != SEED])
    seeds = [seeds_table(groups)] if groups else []
    frontiers = compared.tables() if compared else []
    _show(jobs, [*console_tables(jobs, str(folder)), *seeds, *frontiers])
    pictures = [*([PICTURE] if picture else []), *(path.name for path in drawn)]
    print(
        f"the sweep's table, pictures and page: {folder / TABLE}, "
        f"{', '.join(pictures) or 'no picture'}, {PAGE}"
    )


def _over_seeds(jobs: Sequence[Job], keys: Sequence[str]) -> dict[str, list[Path]]:
    """Directories of jobs that differ in their seed alone, by the other varying keys and their names."""
    given = {job.folder: setting_of(job.overrides, keys) for job in jobs}
    groups = seed_groups(list(given))
    return {f"{given[group[0]]} ({name})".lstrip(): group for name, group in groups.items()}


def write_plans(folder: Path, jobs: Sequence[Job]) -> None:
    """Write plans.csv and print the tables; nothing was trained, so there are no win-rates to plot."""
    write_table(folder / PLANS, *sweep_rows(jobs))
    _show(jobs, plans_tables(jobs, str(folder)))
    print(f"the plans' table: {folder / PLANS}; the shortages are in {PLAN} of each job")


def _show(jobs: Sequence[Job], tables: Sequence[Table]) -> None:
    """Print the tables, then the errors in full."""
    console = Terminal()
    for table in tables:
        console.print(table)
    for job in jobs:
        if job.error:
            console.print(f"job {job.name}: {job.error}", style="red", highlight=False)

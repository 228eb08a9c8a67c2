"""What the jobs of a multirun found, as one table, file, picture and page in the sweep's directory."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Column, Table

from capo.cli.messages import disk_fault, was_interrupted
from capo.cli.plan import PLAN
from capo.errors import InputError
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
    sweep_picture,
)
from capo.preflight.plan_tables import HOLDS, TAKES, plan_cell, plan_figures
from capo.runtime.files import write_table, write_whole
from capo.runtime.run_folder import CONFIG, EVALUATION, OUTCOME, RESULTS, read_outcome

ERROR = "error.txt"  # of a job that failed
FINISHED, PLANNED, FAILED, UNFINISHED = "finished", "planned", "failed", "unfinished"
TABLE, PICTURE, PAGE = "sweep.csv", "sweep.png", "sweep.html"
PLANS = "plans.csv"  # of a multirun with plan=true; the runs' own table may lie beside it
SHARES = ("mean", "low", "high")


def sweep_name(folder: Path) -> str:
    """A sweep's directory as a name: without `multirun`, and without what lies above the working directory."""
    folder = folder.absolute()
    parts = folder.relative_to(Path.cwd()).parts if folder.is_relative_to(Path.cwd()) else (folder.name,)
    return "/".join(parts[1:] if len(parts) > 1 and parts[0] == "multirun" else parts)


def run_job(task: Callable[[], float], folder: Path) -> float:
    """`task()`, or NaN and `folder/error.txt` with what it raised: one failed job must not end a sweep's others."""
    (folder / ERROR).unlink(missing_ok=True)
    try:
        return task()
    except (Exception, SystemExit) as error:
        if was_interrupted(error):
            raise
        message = str(error) if isinstance(error, InputError) else disk_fault(error)
        text = message or "".join(traceback.format_exception(error))
        write_whole(folder / ERROR, text.rstrip() + "\n")
        print(f"error in {folder}: {text.rstrip()}", file=sys.stderr)
        return math.nan


def found_figures(folder: Path) -> dict[str, float]:
    """What a run came to, under the names of `sweep.csv`'s columns; what it has not (yet) is left out.

    `val/win_rate`; `test/win_rate/<reward>` with `/low` and `/high`; `zero/<reward>`; `oracle/<measure>` of the policy, with
    `/base`.
    """
    figures: dict[str, float] = {}
    if (folder / OUTCOME).is_file():
        figures |= {name: value for name, value in read_outcome(folder).items() if name.startswith("val/")}
    path = folder / EVALUATION / RESULTS
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        for name, rate in results["win_rate"].items():
            column = f"test/win_rate/{name}"
            figures |= {column if share == "mean" else f"{column}/{share}": rate[share] for share in SHARES}
        figures |= {f"zero/{name}": rate["mean"] for name, rate in results["zero"].items()}
        for name, measure in results.get("oracle", {}).items():
            figures |= {f"oracle/{name}": measure["policy"], f"oracle/{name}/base": measure["base"]}
    return figures


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its directory, what the command line gave it, how it ended, what it found."""

    folder: Path
    overrides: Mapping[str, str]
    status: str
    error: str = ""
    figures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The directory's name, by default the job's number."""
        return self.folder.name

    @property
    def done(self) -> bool:
        """Whether it has all that it was to find."""
        return self.status in (FINISHED, PLANNED)


def _read_overrides(folder: Path) -> dict[str, str]:
    overrides = {}
    for override in OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml")):
        key, _, value = override.partition("=")
        overrides[key.lstrip("+")] = value
    return overrides


def read_job(folder: Path) -> Job:
    """What a job's directory says of its run."""
    overrides = _read_overrides(folder)
    if (folder / ERROR).is_file():
        return Job(
            folder,
            overrides,
            FAILED,
            _summary((folder / ERROR).read_text(encoding="utf-8")),
            found_figures(folder),
        )
    return Job(
        folder,
        overrides,
        FINISHED if (folder / OUTCOME).is_file() else UNFINISHED,
        figures=found_figures(folder),
    )


def read_plan(folder: Path) -> Job:
    """What a job's directory says of its plan."""
    overrides = _read_overrides(folder)
    if (folder / ERROR).is_file():  # what plan.json there is, is an earlier one
        return Job(folder, overrides, FAILED, _summary((folder / ERROR).read_text(encoding="utf-8")))
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    return Job(folder, overrides, PLANNED, figures=plan_figures(plan))


def _summary(text: str) -> str:
    """An error in one line: a message as it is, of a trace its last line."""
    lines = [line.strip() for line in text.strip().splitlines()] or ["unknown"]
    return lines[-1] if lines[0].startswith("Traceback") else " ".join(lines)


def _job_folders(sweep: Path, mark: str) -> list[Path]:
    """Those that have the file `mark` or an error, 2 before 10."""
    folders = [path.parents[1] for path in sweep.glob("*/.hydra/overrides.yaml")]
    there = [folder for folder in folders if (folder / mark).is_file() or (folder / ERROR).is_file()]
    return sorted(there, key=lambda folder: (len(folder.name), folder.name))


def read_jobs(sweep: Path) -> list[Job]:
    """The training jobs in a sweep's directory, in order; what has only been planned is none."""
    return [read_job(folder) for folder in _job_folders(sweep, CONFIG)]


def read_plans(sweep: Path) -> list[Job]:
    """The jobs of a sweep with `plan=true`, in order."""
    return [read_plan(folder) for folder in _job_folders(sweep, PLAN)]


def varying_keys(jobs: Sequence[Job]) -> list[str]:
    """The override keys that differ between jobs, in the order of the command line."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def sweep_rows(jobs: Sequence[Job]) -> tuple[list[str], list[dict[str, object]]]:
    """Columns and rows of `sweep.csv` or `plans.csv`: job, status, error, each varying key verbatim, figures."""
    keys = varying_keys(jobs)
    figures = list(dict.fromkeys(name for job in jobs for name in job.figures))
    rows = [
        {"job": job.name, "status": job.status, "error": job.error}
        | {key: job.overrides.get(key, "") for key in keys}
        | {name: job.figures.get(name, "") for name in figures}
        for job in jobs
    ]
    return ["job", "status", "error", *keys, *figures], rows


def console_tables(jobs: Sequence[Job], title: str) -> list[Table]:
    """A row a job: what varies, validation and test win-rates in % with intervals; then zero lines, then the oracle, where there are any."""
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
    """A row a job with `columns`: heading -> figure; a job that is not done shows its status."""
    keys = varying_keys(jobs)
    table = Table(
        "job",
        *(Column(key, overflow="fold", min_width=len(key)) for key in keys),
        title=title,
        box=box.SIMPLE_HEAD,
    )
    for head in columns:
        table.add_column(head, overflow="fold")  # a narrow console wraps figures, never cuts them
    for job in jobs:
        given = [job.overrides.get(key, "") for key in keys]
        cells = [cell(job.figures, name) for name in columns.values()] if job.done else [job.status]
        table.add_row(job.name, *given, *cells, style="" if job.done else "red")
    return table


def _rate(figures: Mapping[str, float], name: str) -> str:
    rate, span = percent(figures, name), interval(figures, name)
    return f"{rate} ({span})" if span else rate


def plans_tables(jobs: Sequence[Job], title: str) -> list[Table]:
    """A row a planned job: what varies, parameters, memory and disk; then steps, images, hours, and how much is missing here."""
    return [
        _job_table(jobs, HOLDS, plan_cell, title),
        _job_table(jobs, TAKES, plan_cell, "what it takes, and how much is missing here"),
    ]


def report_sweep(folder: Path, plans: bool) -> bool:
    """Write and print what the jobs in a sweep's directory found, or planned; returns whether all of them are done."""
    jobs = read_plans(folder) if plans else read_jobs(folder)
    if jobs:
        (write_plans if plans else write_runs)(folder, jobs)
    return all(job.done for job in jobs)


def write_runs(folder: Path, jobs: Sequence[Job]) -> None:
    """Write sweep.csv, sweep.png and sweep.html, and print the tables."""
    columns, rows = sweep_rows(jobs)
    keys = varying_keys(jobs)
    write_table(folder / TABLE, columns, rows)
    picture = sweep_picture(rows, keys)
    if picture is not None:
        write_whole(folder / PICTURE, picture)
    write_whole(folder / PAGE, render_page(str(folder), rows, keys, picture))
    _show(jobs, console_tables(jobs, str(folder)))
    print(
        f"the sweep's table, picture and page: {folder / TABLE}, {PICTURE if picture else 'no picture'}, {PAGE}"
    )


def write_plans(folder: Path, jobs: Sequence[Job]) -> None:
    """Write plans.csv and print the tables; nothing was trained, so there are no win-rates to plot."""
    write_table(folder / PLANS, *sweep_rows(jobs))
    _show(jobs, plans_tables(jobs, str(folder)))
    print(f"the plans' table: {folder / PLANS}; what is missing: {PLAN} of each job")


def _show(jobs: Sequence[Job], tables: Sequence[Table]) -> None:
    """Tables on the console, then the errors in full."""
    console = Console()
    for table in tables:
        console.print(table)
    for job in jobs:
        if job.error:
            console.print(f"job {job.name}: {job.error}", style="red", highlight=False, markup=False)

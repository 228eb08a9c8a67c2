"""Sweeps: one table of all jobs, a failed one among them."""

import csv
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from capo.cli import train as train_script
from capo.cli.messages import REFUSED
from capo.cli.sweep import (
    FAILED,
    FINISHED,
    PLANNED,
    UNFINISHED,
    console_tables,
    plans_tables,
    read_jobs,
    read_plans,
    report_sweep,
    run_job,
    sweep_name,
    sweep_rows,
    varying_keys,
    write_runs,
    write_table,
)
from capo.errors import InputError
from capo.evaluation.reports.sweep_page import curves, drawn, render_page, sweep_picture, swept_axis
from capo.runtime.launch import Launch
from fixtures import ROOT

RESULTS = {
    "score": {},
    "policy": "p",
    "base": "b",
    "win_rate": {
        "looks": {"mean": 0.7, "low": 0.6, "high": 0.8},
        "alignment": {"mean": 0.45, "low": 0.4, "high": 0.49},
    },
    "zero": {
        "looks": {"mean": 0.51, "low": 0.4, "high": 0.6},
        "alignment": {"mean": 0.5, "low": 0.4, "high": 0.6},
    },
    "oracle": {"alignment": {"policy": 0.61, "base": 0.7, "low": -0.12, "high": -0.05}},
}
FIGURES = [
    "val/win_rate",
    "test/win_rate/looks",
    "test/win_rate/looks/low",
    "test/win_rate/looks/high",
    "test/win_rate/alignment",
    "test/win_rate/alignment/low",
    "test/win_rate/alignment/high",
    "zero/looks",
    "zero/alignment",
    "oracle/alignment",
    "oracle/alignment/base",
]


def make_job(
    sweep: Path, name: str, overrides: list[str], win_rate: float | None = 0.6, error: str = ""
) -> None:
    folder = sweep / name
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    (folder / "config.yaml").touch()
    if error:
        (folder / "error.txt").write_text(error)
    elif win_rate is not None:
        (folder / "outcome.json").write_text(json.dumps({"val/win_rate": win_rate, "policy": "p"}))
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text(json.dumps(RESULTS))


@pytest.fixture
def sweep(tmp_path):
    trace = "Traceback (most recent call last):\n  File x\nValueError: beta\n"
    make_job(tmp_path, "0", ["objective.beta=10", "+pairs=frs", "seed=1"])
    make_job(tmp_path, "2", ["objective.beta=100", "+pairs=frs", "seed=1"], win_rate=0.7)
    make_job(tmp_path, "10", ["objective.beta=10", "+pairs=sum", "seed=1"], error=trace)
    make_job(tmp_path, "11", ["objective.beta=100", "+pairs=sum", "seed=1"], win_rate=None)
    return tmp_path


def test_rows_hold_every_job_under_the_promised_columns(sweep):
    jobs = read_jobs(sweep)
    assert [(job.name, job.status) for job in jobs] == [
        ("0", FINISHED),
        ("2", FINISHED),
        ("10", FAILED),
        ("11", UNFINISHED),
    ]
    assert varying_keys(jobs) == ["objective.beta", "pairs"]  # seed is the same in all
    columns, rows = sweep_rows(jobs)
    assert columns == ["job", "status", "error", "objective.beta", "pairs", *FIGURES]
    assert (
        rows[1]["objective.beta"] == "100"
        and rows[1]["val/win_rate"] == 0.7
        and rows[1]["test/win_rate/looks/high"] == 0.8
    )
    assert rows[2]["error"] == "ValueError: beta" and rows[2]["val/win_rate"] == ""
    write_table(sweep / "sweep.csv", columns, rows)
    with (sweep / "sweep.csv").open() as file:
        assert [row["oracle/alignment"] for row in csv.DictReader(file)] == ["0.61", "0.61", "", ""]


def test_the_console_and_the_page_show_figures_and_errors(sweep):
    jobs = read_jobs(sweep)
    rates, zero, oracle = console_tables(jobs, "sweep")
    given = ["job", "objective.beta", "pairs"]
    assert [str(column.header) for column in rates.columns] == [
        *given,
        "validation %",
        "looks %",
        "alignment %",
    ]
    assert [str(column.header) for column in zero.columns] == [*given, "looks", "alignment"]
    assert [str(column.header) for column in oracle.columns] == [*given, "alignment"]
    assert list(rates.columns[4].cells) == ["70.0 (60.0–80.0)"] * 2 + ["", ""]
    assert list(rates.columns[3].cells) == ["60.0", "70.0", "failed", "unfinished"]
    assert (
        next(iter(zero.columns[3].cells)) == "51.0" and next(iter(oracle.columns[3].cells)) == "0.700 → 0.610"
    )
    page = render_page("a sweep", sweep_rows(jobs)[1], varying_keys(jobs), b"png")
    for text in (
        'href="2/evaluation/report.html"',
        "ValueError: beta",
        "unfinished",
        "45.0",
        "40.0–49.0",
        "0.700 → 0.610",
        "4 jobs, 2 finished",
        "data:image/png;base64,cG5n",
        'class="below"',
    ):
        assert text in page, text
    assert "http" not in page and 'href="10/' not in page


def row(**values) -> dict:
    return {"job": "0", "status": "finished", "error": "", "val/win_rate": 0.6, **values}


@pytest.mark.parametrize("given, expected", [
    ([{"beta": "10", "seed": "0"}, {"beta": "30", "seed": "1"}, {"beta": "100", "seed": "0"}], "beta"),
    ([{"pairs": "frs", "beta": "1"}, {"pairs": "sum", "beta": "1"}], "beta"),
    ([{"pairs": "frs"}, {"pairs": "sum"}], "pairs"),
    ([{"objective": "sft", "beta": ""}, {"objective": "dpo", "beta": "1"}], "beta"),
])  # fmt: skip
def test_the_axis_is_the_numeric_key_with_most_values(given, expected):
    assert swept_axis([row(**values) for values in given], list(given[0])) == expected
    assert swept_axis([], []) is None


def test_curves_follow_the_axis_and_part_by_the_other_keys():
    rows = [row(beta=beta, pairs=pairs) for pairs in ("frs", "sum") for beta in ("100", "30", "9")]
    found = curves(rows, ["beta", "pairs"], "beta")
    assert {name: [entry["beta"] for entry in group] for name, group in found.items()} == {
        "pairs=frs": ["9", "30", "100"],
        "pairs=sum": ["9", "30", "100"],
    }


@pytest.mark.parametrize("keys", [["objective.beta"], ["pairs"], ["objective.beta", "pairs"]])
def test_a_picture_of_whatever_varies(sweep, tmp_path, keys):
    picture = sweep_picture(sweep_rows(read_jobs(sweep))[1], keys)
    (tmp_path / "picture.png").write_bytes(picture)
    with Image.open(tmp_path / "picture.png") as image:
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 10


def test_names_are_drawn_without_lines_and_a_soup_without_its_validation():
    """A soup of jobs has win-rates on test prompts alone."""
    rates = {f"test/win_rate/looks{end}": 0.6 for end in ("", "/low", "/high")}
    rows = [row(rewards=name, **rates) for name in ("[looks]", "shapes")]
    rows.append({**row(rewards="soup of jobs 0, 1", **rates), "val/win_rate": ""})
    axes = drawn(rows, ["rewards"]).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["[looks]", "shapes", "soup of jobs 0, 1"]
    assert [bar.lines[0].get_linestyle() for bar in axes.containers] == ["None"]
    assert len(axes.containers[0].lines[0].get_xdata()) == 3
    numbers = [{**entry, "rewards": str(place)} for place, entry in enumerate(rows)]
    assert [bar.lines[0].get_linestyle() for bar in drawn(numbers, ["rewards"]).axes[0].containers] == ["-"]


def test_no_picture_where_nothing_varies_or_nothing_finished():
    assert sweep_picture([row()], []) is None
    assert (
        sweep_picture(
            [{"job": "0", "status": "failed", "error": "x", "beta": "1", "val/win_rate": ""}], ["beta"]
        )
        is None
    )


def test_seeds_of_a_setting_are_named_by_it(tmp_path, capsys):
    for name, beta, seed in (("0", 10, 0), ("1", 10, 1), ("2", 30, 0), ("3", 30, 1)):
        make_job(tmp_path, name, [f"objective.beta={beta}", f"seed={seed}"])
        values = {"objective": {"beta": beta}, "seed": seed, "run_dir": str(tmp_path / name)}
        OmegaConf.save(OmegaConf.create(values), tmp_path / name / "config.yaml")
        rates = "prompt_id,win_rate/looks,win_rate/alignment\np0,0.5,0.4\np1,0.9,0.5\n"
        (tmp_path / name / "evaluation" / "win_rates.csv").write_text(rates)
    write_runs(tmp_path, read_jobs(tmp_path))
    shown = capsys.readouterr().out
    assert "over training seeds" in shown
    assert "objective.beta=10 (0, 1)" in shown and "objective.beta=30 (2, 3)" in shown


def test_a_sweep_without_a_job_is_told(tmp_path, capsys):
    assert not report_sweep(tmp_path, plans=False)
    assert f"no job has begun in {tmp_path}: give each swept key a value" in capsys.readouterr().err


def test_a_failed_job_leaves_its_error_and_nan(tmp_path, capsys):
    def fail(error):
        raise error

    assert math.isnan(run_job(lambda: fail(InputError("beta=-1 must be above 0")), tmp_path))
    assert (tmp_path / "error.txt").read_text() == "beta=-1 must be above 0\n"
    assert math.isnan(run_job(lambda: fail(SystemExit(3)), tmp_path))
    assert "SystemExit: 3" in (tmp_path / "error.txt").read_text()
    assert "beta=-1" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run_job(lambda: fail(KeyboardInterrupt()), tmp_path)
    assert run_job(lambda: 0.5, tmp_path) == 0.5 and not (tmp_path / "error.txt").exists()


@pytest.mark.parametrize("finishes", [False, True])
def test_a_failed_job_has_no_results_of_an_earlier_start(tmp_path, finishes):
    """Such as those of another beta, in a sweep's directory that is used again."""
    make_job(tmp_path, "0", ["objective.beta=100"], win_rate=0.6)

    def refused():
        if finishes:  # and fails in its evaluation
            (tmp_path / "0" / "outcome.json").write_text(json.dumps({"val/win_rate": 0.7, "policy": "x"}))
        raise InputError("no such\nbeta")

    assert math.isnan(run_job(refused, tmp_path / "0"))
    (job,) = read_jobs(tmp_path)
    assert (job.status, job.error) == (FAILED, "no such beta")
    assert job.figures.get("val/win_rate") == (0.7 if finishes else None)
    assert finishes or not job.figures


def test_a_sweeps_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep_name(Path("multirun/2026-01-02/03-04-05")) == "2026-01-02/03-04-05"
    assert (
        sweep_name(Path("ablation")) == "ablation" and sweep_name(Path("/elsewhere/ablation")) == "ablation"
    )


def read_table(sweep: Path, name: str = "sweep.csv") -> list[dict]:
    with (sweep / name).open() as file:
        return list(csv.DictReader(file))


PLAN = {
    "parameters": {"denoiser": 1_234_567, "trained": 1000},
    "host": {"peak": 7},
    "device": {"training": {"total": 3e9}, "peak": 4_200_000_000},
    "disk": {"pools": {"train": None, "total": None}, "run": {"total": 9}},
    "steps": 2000,
    "hours": {"training": 0.0123, "sampling": None, "images": None, "total": 2.5},
    "missing here": [
        {"kind": "weights", "message": "a", "certain": True},
        {"kind": "memory", "message": "b", "certain": False},
    ],
}


def test_plans_are_rows_of_their_own(tmp_path):
    for number, model in enumerate(("sdxl", "sd3", "sd15")):
        make_job(
            tmp_path,
            str(number),
            [f"model={model}", "plan=true"],
            win_rate=None,
            error="no configs\n" if model == "sd3" else "",
        )
        (tmp_path / str(number) / "plan.json").write_text(json.dumps(PLAN))
        if model != "sd15":  # which was begun as a run earlier
            (tmp_path / str(number) / "config.yaml").unlink()
    assert [job.name for job in read_jobs(tmp_path)] == [
        "1",
        "2",
    ]  # without an error, what was only planned is no run
    jobs = read_plans(tmp_path)
    assert [job.status for job in jobs] == [PLANNED, FAILED, PLANNED]
    columns, rows = sweep_rows(jobs)
    assert (
        columns[:4] == ["job", "status", "error", "model"]
        and rows[1]["error"] == "no configs"
        and rows[1]["steps"] == ""
    )
    assert [rows[0][name] for name in columns[4:]] == [
        1_234_567,
        1000,
        4_200_000_000,
        7,
        None,
        9,
        None,
        2000,
        0.0123,
        None,
        2.5,
        2,
        1,
    ]
    shown = [[list(column.cells) for column in table.columns] for table in plans_tables(jobs, "sweep")]
    assert [cells[0] for cells in shown[0]] == ["0", "sdxl", "1,234,567", "1,000", "4.2 GB", "unknown"]
    takes = ["0", "sdxl", "2,000", "unknown", "0.012", "2.50", "2", "1"]
    assert [cells[0] for cells in shown[1]] == takes
    assert [cells[1] for cells in shown[0]] == ["1", "sd3", "failed", "", "", ""]


def test_a_multirun_of_plans_ends_with_their_table(typed, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    typed("train", "-m", "plan=true", "trainer.max_steps=2,6", f"hydra.sweep.dir={sweep}")
    assert sorted(path.name for path in sweep.iterdir() if path.is_file()) == ["multirun.yaml", "plans.csv"]
    assert sorted(path.name for path in (sweep / "1").iterdir()) == [".hydra", "plan.json", "train.log"]
    rows = read_table(sweep, "plans.csv")
    found = [(row["status"], row["trainer.max_steps"], row["steps"], row["missing"]) for row in rows]
    assert found == [(PLANNED, "2", "2", "0"), (PLANNED, "6", "6", "0")]
    assert float(rows[1]["hours/training"]) == pytest.approx(3 * float(rows[0]["hours/training"]))
    # a validation a step, of 2 prompts with 2 images; train 4 x 4, validation 2 x 2, test twice and zero once
    # 2 x 2
    assert [int(row["images"]) for row in rows] == [16 + 4 + 3 * 4 + steps * 4 for steps in (2, 6)]
    told = capsys.readouterr().out
    assert "plans.csv" in told and "failed" not in told and "nan" not in told.lower()
    with pytest.raises(SystemExit) as ended:
        typed("train", "-m", "plan=true", "planning.utilization=0.5,2", f"hydra.sweep.dir={sweep}")
    assert ended.value.code == 1
    first, second = read_table(sweep, "plans.csv")
    assert (first["status"], second["status"], second["steps"]) == (
        PLANNED,
        FAILED,
        "",
    ) and "planning.utilization=2" in second["error"]


def test_several_processes_begin_no_sweep_and_no_directories_of_their_own(
    typed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_script, "launch", lambda: Launch(world_size=2))
    monkeypatch.chdir(tmp_path)
    for arguments, refusal in {
        (
            "-m",
            "seed=0,1",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
        ): "-m with 2 processes: each would start the whole sweep",
        ("seed=0",): "2 processes would each make a run directory: give them a common one, hydra.run.dir=DIR",
    }.items():
        with pytest.raises(SystemExit) as ended:
            typed("train", *arguments)
        assert ended.value.code == REFUSED and refusal in capsys.readouterr().err
    typed("train", "plan=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert (tmp_path / "run" / "plan.json").is_file()


def test_a_multirun_with_a_failing_job_ends_with_its_table(typed, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    arguments = ["-m", "objective.beta=10,30", "pairs=frs,best_worst", f"hydra.sweep.dir={sweep}"]
    with pytest.raises(SystemExit) as ended:
        typed("train", *arguments)
    assert ended.value.code == 1
    rows = read_table(sweep)
    assert [row["status"] for row in rows] == [FINISHED, FAILED, FINISHED, FAILED]
    assert [(row["objective.beta"], row["pairs"]) for row in rows] == [
        ("10", "frs"),
        ("10", "best_worst"),
        ("30", "frs"),
        ("30", "best_worst"),
    ]
    assert "best_worst orders the candidates by one reward" in rows[1]["error"]
    found = json.loads((sweep / "0" / "evaluation" / "results.json").read_text())["win_rate"]["g"]
    assert [float(rows[0][f"test/win_rate/g{end}"]) for end in ("", "/low", "/high")] == [
        found["mean"],
        found["low"],
        found["high"],
    ]
    assert (sweep / "sweep.png").is_file() and not (sweep / "frontier.png").exists()  # several keys vary
    page = (sweep / "sweep.html").read_text()
    assert "<h2>Frontiers</h2>" in page and page.count("data:image/png") == 1  # of two rewards
    # the jobs that are done differ in beta alone: one method of two points
    assert (
        rows[0]["frontier/hypervolume"] == rows[2]["frontier/hypervolume"] != rows[1]["frontier/hypervolume"]
    )
    volumes = [float(row["test/hypervolume"]) for row in (rows[0], rows[2])]
    assert float(rows[0]["frontier/hypervolume"]) >= max(volumes) - 1e-6
    assert float(rows[0]["test/drift"]) > 0 and float(rows[0]["test/diversity/base"]) > 0
    assert "best_worst orders" in capsys.readouterr().out


@pytest.mark.slow
def test_jobs_in_parallel_give_the_serial_table(typed, tmp_path):
    for name, launcher in {"serial": "basic", "parallel": "joblib"}.items():
        typed(
            "train",
            "-m",
            "objective.beta=10,30",
            f"hydra/launcher={launcher}",
            f"hydra.sweep.dir={tmp_path / name}",
            f"pool.root={tmp_path / name / 'pools'}",
        )
    assert read_table(tmp_path / "serial") == read_table(tmp_path / "parallel")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="the extra `submitit` is not installed")
def test_submitit_takes_each_job_to_a_process_of_its_own(tmp_path):
    values = ["plan=true", "objective.beta=10,30", f"hydra.sweep.dir={tmp_path}", f"pool.root={tmp_path}"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "-m", *values, "hydra/launcher=submitit_local"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "plans.csv").open(newline="") as file:
        rows = [(row["objective.beta"], row["status"]) for row in csv.DictReader(file)]
    assert rows == [("10", "planned"), ("30", "planned")]
    assert len(list(tmp_path.glob(".submitit/*/*_result.pkl"))) == 2


def test_a_damaged_file_of_a_job_costs_its_row_alone(sweep):
    (sweep / "2" / "outcome.json").write_text("{")
    found = {job.name: job for job in read_jobs(sweep)}
    assert found["0"].status == FINISHED and found["2"].status == FAILED
    assert "outcome.json cannot be read" in found["2"].error

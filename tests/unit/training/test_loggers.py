"""What trackers get to know of a run, read back from what they keep."""

import csv
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capo.errors import DamagedFile, InputError
from capo.training.loggers import CurvesFile, pool_seconds, wandb_logger
from capo.training.wandb_run import RunIdentity, wandb_mode
from fixtures.wandb_files import collected, ended_records


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.slow
def test_the_jobs_of_a_sweep_are_runs_of_one_group(typed, tiny_run, tmp_path, offline):
    cfg = tiny_run("unused")
    sweep = tmp_path / "ablation"
    typed("train", "-m", "objective.beta=10,30", "logger=wandb", f"hydra.sweep.dir={sweep}")
    with (sweep / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    ids = set()
    for number, beta in enumerate((10, 30)):
        found, record = (
            collected(sweep / str(number)),
            json.loads((sweep / str(number) / "wandb.json").read_text()),
        )
        ids |= set(found["ids"])
        assert found["ids"] == [record["id"]]
        assert (
            found["group"] == record["group"] == "ablation"
            and found["job_type"] == record["job_type"] == "train"
        )
        assert found["tags"] == set(record["tags"]) == {"capo", "frs", "tiny", "r", "g"}
        axes = {
            "objective": "capo",
            "beta": beta,
            "bias": cfg.noise.bias,
            "pairs": "frs",
            "rewards": "g+r",
            "model": "tiny",
            "lr": cfg.trainer.lr,
            "seed": 0,
        }
        for key, value in axes.items():
            assert found["config"][key] == record["config"][key] == value, key
        for key in ("val/win_rate", "test/win_rate/g", "test/win_rate/g/low", "zero/r"):
            assert found["summary"][key] == record["summary"][key] == float(rows[number][key]), key
        assert {"train/loss", "val/win_rate/r", "validation/_type", "outcome/_type"} <= found["history"]
    assert len(ids) == 2


def rows_of(folder: Path) -> list[dict]:
    """The rows of the history of an offline run, in the order in which they were logged."""
    [path] = folder.glob("wandb/offline-*/*.wandb")
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in ended_records(path)
        if record.HasField("history")
    ]


def axes_of(folder: Path) -> dict[str, str]:
    """Figure of an offline run -> the figure over which it is drawn, as numbers of W&B's definitions."""
    [path] = folder.glob("wandb/offline-*/*.wandb")
    return {
        record.metric.name: record.metric.step_metric
        for record in ended_records(path)
        if record.HasField("metric") and record.metric.name
    }


@pytest.mark.parametrize("script", [pytest.param("train", marks=pytest.mark.slow), "generate"])
def test_trackers_get_the_progress_of_pools_and_the_curves_do_not(typed, tmp_path, offline, script):
    folder = tmp_path / "run"
    places = [f"hydra.run.dir={folder}", f"pool.root={tmp_path / 'pools'}"]
    typed(script, "logger=wandb", *places)
    pools = ["train", "validation", "test", "zero", *(["policy"] if script == "train" else [])]
    figures = {f"pool/{pool}/{stage}" for pool in pools for stage in ("text", "latents", "scores")}
    with (folder / "pools.csv").open() as file:
        written = list(csv.DictReader(file))
    assert figures <= set(written[0]) and "step" not in written[0]
    for name in figures:
        assert [row[name] for row in written if row[name]] == ["1.0"]
    assert all(name.startswith("time/") or name in figures for name in written[0])
    logged, axes = rows_of(folder), axes_of(folder)
    followed = [row for row in logged if any(name in row for name in figures)]
    assert len(followed) == len(written) == len(figures)
    assert all(axes[name] == "time/pool/seconds" for name in figures)
    assert [row["_step"] for row in logged] == sorted({row["_step"] for row in logged})
    if script == "train":
        assert "pool/" not in (folder / "metrics.csv").read_text()
        assert json.loads((folder / "wandb.json").read_text())["job_type"] == "train"
    else:
        assert not (folder / "metrics.csv").exists()
        assert json.loads((folder / "wandb.json").read_text())["job_type"] == "generate"
    assert pool_seconds(folder) == float(written[-1]["time/pool/seconds"])


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_id(typed, tmp_path, offline):
    arguments = ["logger=wandb", "evaluate=false", f"hydra.run.dir={tmp_path / 'run'}"]
    typed("train", *arguments)
    time.sleep(1)  # a directory is named after the second in which it was made
    typed("train", *arguments, "trainer.max_steps=3")
    ids = collected(tmp_path / "run")["ids"]
    assert len(ids) == 2 and len(set(ids)) == 1


def test_only_a_key_goes_online(monkeypatch):
    for mode, key, told in (
        ("", None, "offline"),
        ("", "x" * 40, "online"),
        ("offline", "x" * 40, "offline"),
        ("Online", None, "online"),
        ("disabled", "x" * 40, "disabled"),
        ("dryrun", "x" * 40, "offline"),
        ("run", None, "online"),
        ("shared", None, "shared"),
    ):
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv(
            "WANDB_API_KEY", raising=False
        )
        assert wandb_mode() == told


def test_a_misspelt_mode_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "plane")
    with pytest.raises(InputError, match=r"variable WANDB_MODE=plane: must be one of online, offline, "):
        wandb_logger(tmp_path, "capo").begin(RunIdentity({}, {}))
    assert not any(tmp_path.iterdir())


def test_a_disabled_run_keeps_nothing_of_wandbs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = wandb_logger(tmp_path, "capo")
    run.begin(RunIdentity({}, {}))
    run.log_metrics({"loss": 1.0}, 1)
    run.log_pools({"pool/train/latents": 0.5, "time/pool/seconds": 30.0})
    run.summarize({"win_rate": 0.5})
    run.close()
    assert [path.name for path in tmp_path.iterdir()] == ["wandb.json"]
    assert "wandb sync" not in capsys.readouterr().out


def test_curves_are_kept_and_cut(tmp_path):
    curves = CurvesFile(tmp_path)
    for step in range(1, 4):
        curves.log_metrics({"loss": step / 2}, step)
    curves.save()
    again = CurvesFile(tmp_path)
    again.drop_after(2)
    again.log_metrics({"accuracy": 1.0}, 3)
    again.finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == "accuracy,loss,step\n,0.5,1\n,1.0,2\n1.0,,3\n"


def test_pools_of_something_else_get_no_rows(tmp_path):
    (tmp_path / "pools.csv").write_text("pool,depth\nlap,2\n")
    with pytest.raises(DamagedFile, match=r"no column time/pool/seconds, so no run .*; move it away, or "):
        pool_seconds(tmp_path)


def test_rows_of_pools_are_kept_when_a_run_resumes(tmp_path):
    assert pool_seconds(tmp_path) == 0
    curves = CurvesFile(tmp_path)
    curves.log_pools({"pool/train/latents": 0.5, "time/pool/seconds": 30.0})
    curves.log_metrics({"loss": 1.0}, 1)
    curves.drop_after(0)
    again = CurvesFile(tmp_path)
    again.log_pools({"pool/train/latents": 1.0, "time/pool/seconds": 62.5})
    table = "pool/train/latents,time/pool/seconds\n0.5,30.0\n1.0,62.5\n"
    assert (tmp_path / "pools.csv").read_text() == table and pool_seconds(tmp_path) == 62.5
    (tmp_path / "pools.csv").write_text("time/pool/seconds\nsoon\n")
    with pytest.raises(InputError, match=r"pools.csv cannot be read \(time/pool/seconds is 'soon', not a"):
        pool_seconds(tmp_path)


def test_processes_with_one_folder_add_to_each_others_rows_of_pools(tmp_path):
    def rows(writer):
        curves = CurvesFile(tmp_path)
        for moment in range(20):
            curves.log_pools({"pool/train/latents": writer, "time/pool/seconds": float(moment)})

    with ThreadPoolExecutor(3) as writers:
        list(writers.map(rows, range(3)))
    written = (tmp_path / "pools.csv").read_text().splitlines()
    assert len(written) == 1 + 60 == len(set(written))
    assert [path.name for path in tmp_path.iterdir()] == ["pools.csv"]

"""Runs that are cut off and go on, recognize themselves, and refuse to be another."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from capo.cli import train as train_script
from capo.cli.run_config import differences
from capo.errors import DamagedFile, InputError
from capo.module import PreferenceModule
from fixtures import ROOT

STEPS = ["trainer.max_steps=7", "validation.every=2", "trainer.log_every=1", "evaluate=false"]


class Cut(BaseException):
    """Stands for whatever ends a process."""


def curves(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_run(first: Path, second: Path) -> None:
    assert curves(first) == curves(second)
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    outcomes = [json.loads((folder / "outcome.json").read_text()) for folder in (first, second)]
    assert outcomes[0] == outcomes[1]
    assert sorted(p.name for p in (first / "checkpoints").iterdir()) == sorted(
        p.name for p in (second / "checkpoints").iterdir()
    )


def batches_of_two(accumulate: int) -> list[str]:
    """A step of that many batches."""
    return [f"trainer.batch={2 * accumulate}", "trainer.micro_batch=2"]


@pytest.fixture(scope="module")
def whole(tiny_run):
    """A run that nothing has cut off, for each number of batches a step."""
    folders = {}
    for accumulate in (1, 2):
        train_script.run(tiny_run(f"whole{accumulate}", *STEPS, *batches_of_two(accumulate)))
        folders[accumulate] = tiny_run.folder / f"whole{accumulate}"
    return folders


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batches", [1, 5, 6])  # before the first checkpoint, between two, just after one
def test_a_run_that_was_cut_off_becomes_the_uninterrupted_one(
    tiny_run, whole, monkeypatch, accumulate, batches
):
    name = f"cut{accumulate}-{batches}"
    cfg = tiny_run(name, *STEPS, *batches_of_two(accumulate))
    step, calls = PreferenceModule.training_step, []

    def training_step(self, batch, index):
        calls.append(index)
        if len(calls) > batches:
            raise Cut
        return step(self, batch, index)

    monkeypatch.setattr(PreferenceModule, "training_step", training_step)
    with pytest.raises(Cut):
        train_script.run(cfg)
    monkeypatch.setattr(PreferenceModule, "training_step", step)
    train_script.run(cfg)
    assert_same_run(tiny_run.folder / name, whole[accumulate])


def test_a_finished_run_says_so_and_returns_what_is_stored(tiny_run, whole, capsys, monkeypatch):
    monkeypatch.setattr(
        "capo.cli.tune.build_components", lambda *given, **options: pytest.fail("nothing is to be done")
    )
    before = {path: path.stat().st_mtime_ns for path in (whole[1] / "checkpoints").iterdir()}
    stored = json.loads((whole[1] / "outcome.json").read_text())["val/win_rate"]
    assert train_script.run(tiny_run("whole1", *STEPS, "data.workers=2")) == stored  # workers may differ
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (whole[1] / "checkpoints").iterdir()}


def test_another_configuration_is_refused_with_the_differences(tiny_run, whole):
    config = (whole[1] / "config.yaml").read_bytes()
    with pytest.raises(InputError) as refused:
        train_script.run(tiny_run("whole1", *STEPS, "objective.beta=7", "seed=3"))
    message = str(refused.value)
    assert (
        f"objective.beta: {tiny_run('unused').objective.beta} -> 7" in message
        and "seed: 0 -> 3" in message
        and "hydra.run.dir" in message
    )
    assert message.count("->") == 2
    assert (whole[1] / "config.yaml").read_bytes() == config


def test_more_steps_go_on_from_a_finished_run(tiny_run, whole):
    steps = [value for value in STEPS if "max_steps" not in value]
    train_script.run(tiny_run("longer", *steps, "trainer.max_steps=4"))
    folder = tiny_run.folder / "longer"
    kept = {name: (folder / name).read_bytes() for name in ("outcome.json", "config.yaml")}
    for name in ("metrics.csv", "checkpoints/last.ckpt"):  # refused, and the finished run stays one
        whole_file = (folder / name).read_bytes()
        (folder / name).write_bytes(whole_file[:-30])
        with pytest.raises(DamagedFile, match=f"{name} cannot be read"):
            train_script.run(tiny_run("longer", *steps, "trainer.max_steps=7"))
        assert kept == {name: (folder / name).read_bytes() for name in kept}
        (folder / name).write_bytes(whole_file)
    train_script.run(tiny_run("longer", *steps, "trainer.max_steps=7"))
    assert_same_run(tiny_run.folder / "longer", whole[1])


def test_differences_name_leaves_and_leave_out_what_is_free():
    old = {"a": {"b": 1, "c": [1, 2]}, "logger": {"x": 1}, "pool": {"root": "x", "seed": 0}, "gone": None}
    new = {"a": {"b": 2, "c": [1, 2]}, "logger": {}, "pool": {"root": "y", "seed": 0}, "there": 1}
    assert differences(old, new) == ["a.b: 1 -> 2", "gone: None -> (not there)", "there: (not there) -> 1"]


def test_runs_begun_before_the_adapters_rate_was_a_key_go_on_where_the_rate_in_use_is_the_same():
    old, new = (
        {"model": {"name": "x"}, "trainer": {"lr": 1e-3}},
        {"model": {"name": "x", "adapter_lr": 1e-3}, "trainer": {"lr": 1e-3}},
    )
    assert differences(old, new) == []
    assert differences(old, new | {"trainer": {"lr": 1e-4}}) == ["trainer.lr: 0.001 -> 0.0001"]


def command(tiny_run, name: str) -> list[str]:
    """The real script in a process of its own, with everything that `tiny_run` configures written out."""
    cfg = tiny_run(name, *STEPS)
    OmegaConf.update(cfg, "trainer.max_steps", 40)
    OmegaConf.update(cfg, "validation.every", 10)
    path = tiny_run.folder / f"{name}.yaml"
    OmegaConf.save(cfg, path, resolve=True)
    code = (
        "import sys; from omegaconf import OmegaConf; from capo.cli import train; "
        "sys.path.insert(0, 'tests'); train.run(OmegaConf.load(sys.argv[1]))"
    )
    return [sys.executable, "-c", code, str(path)]


def start(tiny_run, name: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(tiny_run, name),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )


def kill_when(process: subprocess.Popen, happened) -> None:
    deadline = time.monotonic() + 600
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_goes_on(tiny_run):
    folder = tiny_run.folder
    done = start(tiny_run, "unkilled")
    assert done.wait(900) == 0, done.stderr.read()[-2000:]
    last = folder / "killed" / "checkpoints" / "last.ckpt"
    seen: list[float] = []

    def written() -> bool:
        """A checkpoint that was not there when the process began is there, or its unfinished file."""
        if (last.parent / ".last.ckpt.tmp").exists():
            return True
        return last.exists() and last.stat().st_mtime not in seen

    pictures = folder / "killed" / "validation" / "step000010.png"
    for happened in (
        lambda: (folder / "killed" / "validation" / "step000000.png").exists(),
        pictures.exists,
        written,
        written,
    ):
        if last.exists():
            seen.append(last.stat().st_mtime)
        kill_when(start(tiny_run, "killed"), happened)
    done = start(tiny_run, "killed")
    assert done.wait(900) == 0, done.stderr.read()[-2000:]
    assert_same_run(folder / "killed", folder / "unkilled")

"""Checkpoints between validations, and those of a run that is told to end."""

import csv
import multiprocessing
import os
import signal
import subprocess

import pytest
import torch

from capo.cli import train as train_script
from capo.cli.messages import plain_errors
from capo.module import PreferenceModule

RUN = ["trainer.max_steps=6", "validation.every=6", "evaluate=false", "trainer.log_every=1"]


def last_step(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture
def act_at(monkeypatch):
    """Do something once, in the training step of a global step."""

    def make(number, action):
        step, done = PreferenceModule.training_step, []

        def watched(self, batch, index):
            if self.global_step == number and not done:
                done.append(number)
                action()
            return step(self, batch, index)

        monkeypatch.setattr(PreferenceModule, "training_step", watched)

    return make


def to_all_processes(number, others):
    """Send a signal to loader workers too, as a scheduler does: from outside, and to them first.

    `others`: children that were there before the run, such as joblib's workers of another test.
    """
    pids = [child.pid for child in set(multiprocessing.active_children()) - others] + [os.getpid()]
    assert len(pids) == 3
    subprocess.run(["kill", f"-{int(number)}", *map(str, pids)], check=True)


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGUSR1, 2),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_end_keeps_its_last_step_and_resumes(tiny_run, act_at, capsys, number, workers):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    name = f"ended{number}-{workers}"
    others = set(multiprocessing.active_children())
    act_at(3, lambda: to_all_processes(number, others) if workers else os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended, plain_errors():
        train_script.run(tiny_run(name, *RUN, f"data.workers={workers}"))
    assert ended.value.code == 143 and "ended by SIGTERM" in capsys.readouterr().err
    folder = tiny_run.folder / name
    assert last_step(folder) == 4 and not (folder / "outcome.json").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
    train_script.run(tiny_run(name, *RUN))
    train_script.run(tiny_run("whole", *RUN))
    assert losses(folder) == losses(tiny_run.folder / "whole") and len(losses(folder)) == 6


def test_checkpoints_are_saved_between_validations(tiny_run, act_at):
    class Died(Exception):
        pass

    def die():
        raise Died

    act_at(5, die)
    for every, kept in {"2": 4, "3": 3}.items():
        act_at(5, die)
        with pytest.raises(Died):
            train_script.run(tiny_run(f"every{every}", *RUN, f"trainer.checkpoint_every={every}"))
        assert last_step(tiny_run.folder / f"every{every}") == kept
    act_at(5, die)
    with pytest.raises(Died):
        train_script.run(tiny_run("none", *RUN))
    assert not (tiny_run.folder / "none/checkpoints/last.ckpt").exists()

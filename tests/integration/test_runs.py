"""Runs that are cut off and go on, recognize themselves, and refuse to be another."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from capo.cli import train as train_script
from capo.cli.run_changes import differences
from capo.cli.run_config import read_config
from capo.errors import DamagedFile, InputError
from capo.module import PreferenceModule

STEPS = ["trainer.max_steps=5", "validation.every=2", "trainer.log_every=1", "evaluate=false"]


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


@pytest.mark.parametrize(
    ("accumulate", "batches"),
    [
        pytest.param(accumulate, batches, marks=[] if fast else [pytest.mark.slow])
        for accumulate, batches, fast in (
            (1, 1, True), (2, 1, False),  # before the first checkpoint
            (2, 5, True), (1, 3, False),  # between two
            (1, 4, True), (2, 4, False),  # just after one
        )
    ],
)  # fmt: skip
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
            train_script.run(tiny_run("longer", *steps, "trainer.max_steps=5"))
        assert kept == {name: (folder / name).read_bytes() for name in kept}
        (folder / name).write_bytes(whole_file)
    train_script.run(tiny_run("longer", *steps, "trainer.max_steps=5"))
    assert_same_run(folder, whole[1])
    assert read_config(folder).trainer.max_steps == 5


def test_differences_name_leaves_and_leave_out_what_is_free():
    old = {"a": {"b": 1, "c": [1, 2]}, "logger": {"x": 1}, "pool": {"root": "x", "seed": 0}, "gone": None}
    new = {"a": {"b": 2, "c": [1, 2]}, "logger": {}, "pool": {"root": "y", "seed": 0}, "there": 1}
    assert differences(old, new) == ["a.b: 1 -> 2", "gone: None -> (not there)", "there: (not there) -> 1"]
    assert differences({"where": {}}, {"where": None}) == []  # nothing is set in both
    assert differences({"where": {}}, {"where": 0}) == ["where: {} -> 0"]


def test_runs_begun_before_the_adapters_rate_was_a_key_go_on_where_the_rate_in_use_is_the_same():
    old, new = (
        {"model": {"name": "x"}, "trainer": {"lr": 1e-3}},
        {"model": {"name": "x", "adapter_lr": 1e-3}, "trainer": {"lr": 1e-3}},
    )
    assert differences(old, new) == []
    assert differences(old, new | {"trainer": {"lr": 1e-4}}) == ["trainer.lr: 0.001 -> 0.0001"]


# everything that `tiny_run` configures, written out
CODE = """
import sys
from omegaconf import OmegaConf
from capo.cli import train

train.run(OmegaConf.load(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_goes_on(helper, tiny_run):
    folder, script = tiny_run.folder, tiny_run.folder / "run.py"
    script.write_text(CODE)

    def code(name: str, death: str = "") -> int:
        cfg = tiny_run(name, *STEPS, "trainer.max_steps=8")
        OmegaConf.save(cfg, folder / f"{name}.yaml", resolve=True)
        code, error = helper.run(script, folder / f"{name}.yaml", ends=death)
        assert code in (0, -signal.SIGKILL), error[-2000:]
        return code

    assert code("unkilled") == 0
    # before any step, in the middle of writing the second checkpoint, and just after the next one
    deaths = ["after step000000.png 1", "before last.ckpt 2", "after last.ckpt 1", "after step000008.png 1"]
    assert [code("killed", death) for death in deaths] == [-signal.SIGKILL] * len(deaths)
    assert code("killed") == 0
    assert_same_run(folder / "killed", folder / "unkilled")

"""Held-out rewards.

The alarm's arithmetic, its way through configuration and runs, and a real case of hacking.
"""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from capo.backbones.sampling import SamplerSettings
from capo.cli import train as train_script
from capo.cli.messages import grouped
from capo.cli.named_rewards import all_rewards, held_out_rewards
from capo.cli.schema import check_values
from capo.data.prompts import Prompt
from capo.errors import InputError
from capo.evaluation.held_out import HeldOut, alarms, by_prompt, judge, remark
from capo.evaluation.reports.charts import read_curves
from capo.rewards import Reward
from capo.training.validation import ValidationSet, WinRateValidation
from conftest import brightness
from fixtures.configuration import composed
from fixtures.fake_backbone import FakeBackbone
from fixtures.fake_rewards import Brightness


def rates(*values: float) -> torch.Tensor:
    return torch.tensor(values)


# four prompts each: constant ones have the interval [mean, mean]
HIGH, EVEN, LOW = rates(0.75, 0.75, 0.75, 0.75), rates(0.5, 0.5, 0.5, 0.5), rates(0.25, 0.25, 0.25, 0.25)
WIDE = rates(
    0.0, 0.0, 0.0, 1.0
)  # mean 0.25; with chance 0.26 a resample of four has two ones or more: its interval reaches 0.75


@pytest.mark.parametrize(("trained", "held_out", "rings"), [
    ([HIGH], LOW, True),
    ([HIGH, EVEN], LOW, True),  # their mean is 0.625
    ([EVEN], LOW, False),  # nothing has risen
    ([LOW], LOW, False),
    ([HIGH, LOW], LOW, False),  # mean 0.5
    ([HIGH], EVEN, False),
    ([HIGH], HIGH, False),
    ([HIGH], WIDE, False),  # falls, but not beyond its interval
    ([1 - WIDE], LOW, False),  # rises, but not beyond its own
])  # fmt: skip
def test_the_alarm_rings_where_one_rises_and_the_other_falls_beyond_their_intervals(trained, held_out, rings):
    verdict = judge(trained, {"x": held_out, "y": HIGH}, seed=0)
    assert verdict.fallen == (["x"] if rings else [])
    assert verdict.figures() == {
        "val/held_out/alarm": rings,
        "val/held_out/alarm/x": rings,
        "val/held_out/alarm/y": 0,
    }
    message = verdict.message("step 7")
    assert (
        (
            "step 7: reward hacking?" in message
            and "held out x 0.250" in message
            and "y" not in message.split()
        )
        if rings
        else message is None
    )


def test_processes_add_up_to_one():
    whole = by_prompt([{"a": {0: 0.1, 1: 0.2, 2: 0.3}, "b": {0: 1.0, 1: 0.0, 2: 0.5}}])
    shared = by_prompt(
        [{"a": {1: 0.2}, "b": {1: 0.0}}, {"a": {}, "b": {}}, {"a": {2: 0.3, 0: 0.1}, "b": {0: 1.0, 2: 0.5}}]
    )
    assert whole.keys() == shared.keys() == {"a", "b"}
    assert all(torch.equal(whole[name], shared[name]) for name in whole)
    assert whole["a"].tolist() == [0.1, 0.2, 0.3]


def test_steps_of_the_alarm_are_read_from_the_curves(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,train/loss,val/held_out/alarm,val/held_out/alarm/x,val/held_out/alarm/y,"
        "val/held_out/score/x,val/held_out/win_rate/x\n"
        "5,0.1,,,,,\n10,,0.0,0.0,0.0,5.0,0.5\n20,,1.0,1.0,0.0,4.0,0.3\n30,,1.0,1.0,1.0,3.0,0.2\n"
    )
    assert alarms(path) == {"x": [20, 30], "y": [30]}
    assert (
        remark(alarms(path))[0].startswith("x, held out of training, fell below the base in validation")
        and "step 20, 30" in remark(alarms(path))[0]
    )
    assert alarms(tmp_path / "none.csv") == {}
    titles = [chart.title for chart in read_curves(path)]  # what has another scale has a chart of its own
    assert {"val/held_out/alarm", "val/held_out/score/x", "val/held_out/win_rate"} <= set(titles)


@pytest.mark.parametrize(("typed", "read"), [
    ("validation.held_out=[looks]", "rewards@validation.held_out=[looks]"),
    ("validation.held_out=looks", "rewards@validation.held_out=looks"),
    ("validation.held_out=null", "validation.held_out=null"),
    ("validation.held_out={}", "validation.held_out={}"),
    ("validation.held_out.looks.scale=2", "validation.held_out.looks.scale=2"),
    ("validation.every=5", "validation.every=5"),
    ("evaluation.rewards=[looks]", "rewards@evaluation.rewards=[looks]"),
    ("evaluation.rewards=${rewards}", "evaluation.rewards=${rewards}"),
])  # fmt: skip
def test_names_on_the_command_line_are_files_of_rewards(typed, read):
    assert grouped(["-m", typed]) == ["-m", read]


def test_held_out_rewards_are_composed_and_a_trained_one_is_refused():
    cfg = composed(
        "rewards=[looks]",
        "rewards@validation.held_out=[alignment,preference]",
        "validation.held_out.alignment.scale=3",
    )
    trained, evaluated, _ = all_rewards(cfg)
    alignment, preference = held_out_rewards(cfg, trained, evaluated)
    assert (alignment.name, alignment.scale, preference.name) == ("alignment", 3, "preference")
    assert any(preference is reward for reward in evaluated)  # whose weights are in memory once
    assert held_out_rewards(composed(), trained, evaluated) == []
    cfg = composed("rewards@validation.held_out=[looks]")
    with pytest.raises(
        InputError,
        match=r"validation\.held_out: 'looks' is used in training.*rewards=\[alignment,looks,preference\]",
    ):
        held_out_rewards(cfg, *all_rewards(cfg)[:2])
    OmegaConf.update(cfg, "validation.held_out", {"beauty": cfg.rewards.looks}, merge=False)
    with pytest.raises(InputError, match=r"'beauty' is used in training .as 'looks'"):
        held_out_rewards(cfg, *all_rewards(cfg)[:2])


def test_names_that_nobody_has_composed_and_bad_values_are_refused():
    with pytest.raises(InputError, match=r"validation\.held_out=\['looks'\]: must be rewards by name"):
        check_values(composed("validation.held_out=[looks]"))
    with pytest.raises(InputError, match=r"validation\.held_out\.alignment\.link=lg: must be one of"):
        check_values(
            composed("rewards@validation.held_out=[alignment]", "validation.held_out.alignment.link=lg")
        )


@pytest.fixture(scope="module")
def watched(tiny_run):
    """A tiny run with a third reward held out, otherwise the last run of the same name."""

    def make(name: str, *overrides: str, held_out: dict | None = None):
        cfg = tiny_run(name, "evaluate=false", "validation.every=1", *overrides)
        OmegaConf.update(
            cfg, "validation.held_out", {"b": brightness(2)} if held_out is None else held_out, merge=False
        )
        return cfg

    return make


def read(folder):
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_held_out_reward_is_measured_and_moves_nothing(tiny_run, watched):
    with_it, without = watched("watched"), watched("alone", held_out={})
    assert train_script.run(with_it) == train_script.run(without)
    rows, plain = read(tiny_run.folder / "watched"), read(tiny_run.folder / "alone")
    found = [row for row in rows if row["val/win_rate"]]
    assert len(found) == 2
    for row in found:
        assert float(row["val/win_rate"]) == pytest.approx(
            (float(row["val/win_rate/r"]) + float(row["val/win_rate/g"])) / 2
        )
        assert 0 <= float(row["val/held_out/win_rate/b"]) <= 1 and 0 < float(row["val/held_out/score/b"]) < 10
        assert (
            row["val/held_out/alarm"] in ("0.0", "1.0")
            and row["val/held_out/alarm/b"] == row["val/held_out/alarm"]
        )
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in plain]
    assert not any(name.startswith("val/held_out") for name in plain[0])
    assert "alarms" in json.loads((tiny_run.folder / "watched" / "outcome.json").read_text())
    pools = tiny_run.folder / "pools"
    scored = {path.name.split("-")[0] for path in pools.glob("tiny-*-train/scores/*")}
    assert scored == {"r", "g"}  # held out from the candidates
    assert {path.name.split("-")[0] for path in pools.glob("tiny-*-validation/scores/*")} == {"r", "g", "b"}


def test_a_run_that_moves_nothing_rings_no_alarm(tiny_run, watched, capsys):
    train_script.run(watched("still", "trainer.lr=1e-30"))
    for row in read(tiny_run.folder / "still"):
        if row["val/win_rate"]:
            assert row["val/held_out/win_rate/b"] == "0.5" and row["val/held_out/alarm"] == "0.0"
    assert "reward hacking" not in capsys.readouterr().out
    assert json.loads((tiny_run.folder / "still" / "outcome.json").read_text())["alarms"] == {}


class Light(FakeBackbone):
    """On which any policy's images are lighter than nothing."""

    @contextmanager
    def visiting(self, device):
        yield


def test_a_fall_while_training_rises_is_told_at_that_step(tmp_path, capsys):
    """Brightness 0-10 against base scores of -1 (always won), its negative against 1 (always lost)."""
    backbone, prompts = Light(), [Prompt(str(number), f"prompt {number}") for number in range(3)]
    base = ValidationSet(
        prompts,
        backbone.encode_prompts([prompt.text for prompt in prompts]),
        [[1, 2], [3, 4], [5, 6]],
        {"light": torch.full((3, 2), -1.0), "dark": torch.full((3, 2), 1.0)},
        [Image.new("RGB", (2, 2))],
    )
    light, dark = (
        Reward("light", Brightness()),
        Reward("dark", lambda images, prompts: -Brightness()(images, prompts)),
    )
    rows = []
    trainer = SimpleNamespace(
        global_step=5,
        max_steps=5,
        global_rank=0,
        world_size=1,
        is_global_zero=True,
        strategy=SimpleNamespace(root_device="cpu"),
        loggers=[SimpleNamespace(log_metrics=lambda figures, step: rows.append(figures))],
    )
    module = SimpleNamespace(policy=torch.nn.Linear(1, 1), log_dict=lambda *_, **__: None, print=print)
    settings = SamplerSettings(steps=2, guidance=1.0, batch=4)
    WinRateValidation(base, backbone, [light], settings, 5, tmp_path, HeldOut([dark])).on_train_batch_end(
        trainer, module, None, None, 0
    )
    figures = rows[0]
    assert (
        figures["val/win_rate"],
        figures["val/win_rate/light"],
        figures["val/held_out/win_rate/dark"],
    ) == (1, 1, 0)
    assert figures["val/held_out/score/dark"] == pytest.approx(-figures["val/score/light"])
    assert figures["val/held_out/alarm"] == figures["val/held_out/alarm/dark"] == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("(light 1.000)")  # the held-out one is no part of it
    assert told[1].startswith(
        "step 5: reward hacking? The rewards used in training have win-rate 1.000 (1.000 to 1.000) against "
        "the base, but held out dark 0.000"
    )


@pytest.mark.slow
def test_looks_alone_costs_alignment_on_shapes_and_the_alarm_rings(helper, tmp_path):
    """The real world, on the command line: `looks` is blind to the prompt, and nothing else is trained."""
    command = [
        "experiment=quick",
        "rewards=[looks]",
        "validation.held_out=[alignment]",
        "objective.beta=30",
        "trainer.lr=1e-4",
        "trainer.batch=8",
        "trainer.max_steps=120",
        "validation.every=120",
        "prompts.validation=64",
        "validation.images=4",
        "evaluate=false",
        "threads=1",
        f"pool.root={tmp_path / 'pools'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    process = helper.start("train.py", *command)
    assert process.wait() == 0, process.error[-2000:]
    (row,) = [row for row in read(tmp_path / "run") if row["val/win_rate"]]
    assert float(row["val/win_rate/looks"]) > 0.6 and float(row["val/held_out/win_rate/alignment"]) < 0.46
    assert row["val/held_out/alarm"] == row["val/held_out/alarm/alignment"] == "1.0"
    assert "step 120: reward hacking?" in process.output
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["alarms"] == {"alignment": [120]}

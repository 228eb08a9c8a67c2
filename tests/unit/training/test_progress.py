"""The bar of training counts optimizer steps, whatever the number of micro-batches."""

import re
from types import SimpleNamespace

import pytest

from capo.cli import train as train_script
from capo.runtime.outlook import Cost, Hours, Outlook, Work
from capo.training import progress
from capo.training.progress import Pace


def test_the_bar_counts_optimizer_steps_and_shows_the_last_logged_loss(tiny_run, monkeypatch, capsys):
    bars = []

    class Watched(progress.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.seen = [(self.n, self.total)]
            bars.append(self)

        def update(self, count=1):
            shown = super().update(count)
            self.seen.append((self.n, self.total))
            return shown

    monkeypatch.setattr(progress, "tqdm", Watched)
    overrides = ["trainer.batch=4", "trainer.micro_batch=1", "validation.every=2", "evaluate=false"]
    train_script.run(tiny_run("bar", *overrides, "trainer.max_steps=3"))
    [bar] = bars
    assert bar.seen == [(0, 3), (1, 3), (2, 3), (3, 3)] and re.match(r"loss [\d.e-]+", bar.postfix)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("step 2: win-rate against the base")]
    train_script.run(tiny_run("bar", *overrides, "trainer.max_steps=5"))
    assert bars[1].seen == [(3, 5), (4, 5), (5, 5)]  # a resumed run goes on where it stopped


def test_the_pace_of_training_replaces_what_was_estimated(monkeypatch):
    """Resumed at step 10 of 100, a step of 4 pairs in 8 s, a validation of 60 s every 30 steps."""
    clock = SimpleNamespace(now=500.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    units = {("training", "training"): 400, ("validation", "latents"): 40, ("evaluation", "latents"): 10}
    work = [Work(*names, count) for names, count in units.items()]
    outlook = Outlook.of(work, {"training": Cost(1.0), "latents": Cost(36.0)})
    pace, validating = Pace(outlook, batch=4, every=30, more=1), 0.0
    pace.begin(10, validating)
    for step in range(11, 13):
        clock.now += 8
        pace.at(step, 100, validating)
    assert outlook.hours()["training"] == Hours(88 * 4 / 3600)  # 16 s are too little to measure
    clock.now += 8
    pace.at(13, 100, validating)
    assert outlook.hours()["training"].hours == pytest.approx(87 * 8 / 3600)
    assert outlook.hours()["validation"] == Hours(40 * 36 / 3600)
    for step in range(14, 31):
        clock.now += 8
        validating += 60 * (step == 30)
        clock.now += 60 * (step == 30)
        pace.at(step, 100, validating)
    assert outlook.hours()["training"].hours == pytest.approx(70 * 8 / 3600)
    # after steps 60, 90 and 100, and one more at the end
    assert outlook.hours()["validation"].hours == pytest.approx(4 * 60 / 3600)
    assert outlook.hours()["evaluation"] == Hours(0.1)
    assert pace.outlook.note() == f"{(70 * 8 + 240 + 360) / 60:.0f} min left in all"
    assert Outlook().note() == ""

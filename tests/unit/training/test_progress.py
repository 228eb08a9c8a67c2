"""The bar of training counts optimizer steps, whatever the number of micro-batches."""

import re

from capo.cli import train as train_script
from capo.training import progress


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
    assert bar.seen == [(0, 3), (1, 3), (2, 3), (3, 3)] and re.fullmatch(r"loss [\d.e-]+", bar.postfix)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("step 2: win-rate against the base")]
    train_script.run(tiny_run("bar", *overrides, "trainer.max_steps=5"))
    assert bars[1].seen == [(3, 5), (4, 5), (5, 5)]  # a resumed run goes on where it stopped

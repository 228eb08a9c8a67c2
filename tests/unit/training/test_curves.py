from types import SimpleNamespace

from capo.training import curves as rows
from capo.training.curves import Curves


def test_speed_counts_the_loader_and_not_validation(monkeypatch):
    """Two steps of 3 pairs a row: 1 s of loading and 0.5 s of computing each, 10 s of validation between."""
    clock, logged = SimpleNamespace(now=100.0, validation=0.0), []
    monkeypatch.setattr(rows.time, "perf_counter", lambda: clock.now)
    curves = Curves(2, lambda: clock.validation)
    keeper = SimpleNamespace(log_metrics=lambda figures, step: logged.append((step, figures)))
    trainer = SimpleNamespace(global_step=0, world_size=2, loggers=[keeper])
    module = SimpleNamespace(take_figures=lambda of_all: {"train/loss": 1.0, "of_all": of_all})
    curves.on_train_start(trainer, module)
    for step in range(1, 6):
        for micro in range(2):  # an optimizer step of two micro-batches, the second ends it
            clock.now += 0.5
            batch = SimpleNamespace(prompt_ids=["a"] * 6, times=2)
            curves.on_train_batch_start(trainer, module, batch, 0)
            clock.now += 0.25
            trainer.global_step += micro
            curves.on_train_batch_end(trainer, module, None, batch, 0)
        if step % 2:
            clock.now, clock.validation = clock.now + 10, clock.validation + 10
    # a row: 2 steps x 2 micro-batches x 3 pairs x 2 processes = 24 pairs in 4 x 0.75 s
    row = {"train/loss": 1.0, "of_all": True, "time/pairs_per_second": 8.0}
    assert logged == [(2, row), (4, row)]

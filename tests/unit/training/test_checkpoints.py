"""How a run goes on from a checkpoint."""

from capo.training.checkpoints import recount


def test_counts_become_those_of_as_many_steps():
    # three steps of one batch, saved before the last is completed; from now on two batches a step
    progress = {
        where: {"ready": 3, "started": 3, "processed": 3, "completed": 2} for where in ("total", "current")
    }
    recount(progress, 6)
    assert (
        progress["total"] == progress["current"] == {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    )
    recount(progress, 6)
    assert progress["current"]["completed"] == 5

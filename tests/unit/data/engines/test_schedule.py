import itertools
from collections import Counter

import pytest

from benchmarks.cluster import Failures
from benchmarks.simulated_cluster import STAGES, SimulatedCluster, chain
from capo.data.engines.schedule import Room, Schedule


def run(shards, cluster, rooms=None, **options):
    """Run a chain of stages; returns the failures by name, and the names of what was done, counted."""
    done = Counter()
    rooms = rooms or {stage: Room() for stage in STAGES}
    schedule = Schedule(chain(shards), rooms, cluster, done=lambda task: done.update([task.name]), **options)
    failures = {task.name: error for task, error in schedule.run().items()}
    assert not cluster.working  # every worker has ended
    return failures, done


SECONDS = {"text": 2.0, "latents": 600.0, "scores": 120.0}
ALL = {f"{stage} {number:05d}" for stage in STAGES for number in range(20)}


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 64])
def test_everything_is_done_once_and_in_order(devices):
    cluster = SimulatedCluster(devices, SECONDS, jitter=0.3)
    failures, done = run(20, cluster)
    assert not failures and set(done) == ALL and set(done.values()) == {1}
    at = {(what, stage, shard): time for time, what, stage, shard in cluster.log}
    for before, after in itertools.pairwise(STAGES):
        for number in range(20):
            assert at["end", before, f"{number:05d}"] <= at["begin", after, f"{number:05d}"]


def test_no_more_workers_than_devices_or_than_the_stage_may_have():
    most = []

    class Counted(SimulatedCluster):
        def start(self, worker):
            super().start(worker)
            most.append([sum(w.stage == stage for w in self.working) for stage in STAGES])

    run(40, Counted(6, SECONDS), {"text": Room(1, 1), "latents": Room(2), "scores": Room(0.5, 2)})
    assert all(text * 1 + latents * 2 + scores * 0.5 <= 6 for text, latents, scores in most)
    assert max(text for text, _, _ in most) == 1 and max(scores for _, _, scores in most) == 2


def test_the_stage_nearest_the_end_comes_first():
    """With a slot for each stage, a shard is scored long before the last one is drawn."""
    cluster = SimulatedCluster(4, SECONDS)
    run(20, cluster, {"text": Room(1, 1), "latents": Room(1, 2), "scores": Room(1, 1)})
    first_score = next(time for time, what, stage, _ in cluster.log if (what, stage) == ("end", "scores"))
    last_draw = max(time for time, what, stage, _ in cluster.log if (what, stage) == ("begin", "latents"))
    assert first_score < last_draw / 2


def test_a_task_that_fails_is_tried_again():
    tries = {}

    def fault(worker, task):
        if task is not None and task.name == "latents 00007":
            tries[task.name] = tries.get(task.name, 0) + 1
            return ("out of luck", False, False) if tries[task.name] < 3 else None

    failures, done = run(20, SimulatedCluster(2, SECONDS, fault=fault))
    assert not failures and set(done) == ALL and tries == {"latents 00007": 3}


@pytest.mark.parametrize(("final", "tried"), [(False, 3), (True, 1)])
def test_what_fails_for_good_holds_up_what_needs_it_alone(final, tried):
    tries = []

    def fault(worker, task):
        if task is not None and task.name == "latents 00007":
            tries.append(worker)
            return "bad luck", final, False

    failures, done = run(20, SimulatedCluster(2, SECONDS, fault=fault))
    assert failures == {"latents 00007": "bad luck", "scores 00007": "waits for latents 00007"}
    assert set(done) == ALL - failures.keys() and len(tries) == tried


def test_a_shard_that_kills_its_worker_is_given_up_after_three_workers():
    killed = []

    def fault(worker, task):
        if task is not None and task.name == "scores 00003":
            killed.append(worker.handle)
            return "its process ended", False, True

    failures, done = run(20, SimulatedCluster(3, SECONDS, fault=fault))
    assert failures == {"scores 00003": "its process ended"} and set(done) == ALL - failures.keys()
    assert len(set(killed)) == 3


def test_a_stage_none_of_whose_workers_start_fails_with_what_needs_it():
    def fault(worker, task):
        if task is None and worker.stage == "latents":
            return "no weights", False, True

    cluster = SimulatedCluster(4, SECONDS, fault=fault)
    failures, done = run(20, cluster)
    assert set(done) == {name for name in ALL if name.startswith("text")}
    assert failures["latents 00000"] == "no worker can start: no weights"
    assert failures["scores 00000"] == "waits for latents 00000"


def test_a_stage_goes_on_with_the_workers_it_has():
    started = []

    def fault(worker, task):
        if task is None and worker.stage == "latents":
            started.append(worker)
            return ("no room on that machine", False, True) if len(started) > 1 else None

    failures, done = run(20, SimulatedCluster(4, SECONDS, fault=fault))
    assert not failures and set(done) == ALL and len(started) > 3


def test_a_starved_stage_gives_its_device_back():
    """Half of the latents are there: scoring has work at once, and must not keep what drawing waits for."""
    tasks = chain(20)
    for latents, scores in zip(tasks["latents"][:10], tasks["scores"][:10], strict=True):
        tasks["latents"].remove(latents)
        scores.needs = None
    tasks["text"] = []
    for latents in tasks["latents"]:
        latents.needs = None
    cluster = SimulatedCluster(1, SECONDS)
    assert Schedule(tasks, {stage: Room() for stage in STAGES}, cluster).run() == {}
    assert cluster.now < 10 * 600 + 20 * 120 + 25 * 60


@pytest.mark.parametrize("devices", [2, 8, 64])
def test_devices_are_busy(devices):
    """At least 90 % of the devices' time goes into work that is kept, with one task in a hundred failing."""
    lost = Failures(0.01)
    cluster = SimulatedCluster(devices, SECONDS, fault=lost, jitter=0.2)
    failures, done = run(1000, cluster)
    assert not failures and len(done) == 3000 and lost.count > 10
    assert cluster.utilization() > 0.9

"""The benchmark of what the engine of a Ray cluster costs, at its smallest size."""

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from benchmarks import engine_cost
from benchmarks.processor_time import descendants, spent
from fixtures.ray_clusters import PATHS


def test_a_shards_time_is_told_from_what_is_around_it(tmp_path):
    """By process and thread, at the begin and the end of each shard.

    Latents: after each worker's first shard 2, and 1 and 1 s in the shard; from end to end 2.5, and 1.25 and
    1.75 s, so 0.5, 0.25 and 0.75 s around it.
    """
    notes = {
        "text-1": [(4.0, 4.0, 5.0, 5.0), (5.0, 5.0, 5.5, 5.5)],
        "latents-1": [(9.0, 7.0, 10.0, 8.0), (10.25, 8.0, 12.5, 10.0)],
        "latents-2": [(8.0, 8.0, 9.0, 9.0), (9.0, 9.0, 10.25, 10.0), (10.5, 10.0, 12.0, 11.0)],
        "scores-3": [(6.0, 6.0, 9.0, 9.0), (9.0, 9.0, 10.0, 10.0)],
    }
    for name, times in notes.items():
        (tmp_path / name).write_text("".join(f"{' '.join(map(str, own))}\n" for own in times))
    cost = engine_cost.read_notes(tmp_path)
    assert cost.shard == {"around": 0.5, "text": 0.5, "latents": 1.0, "scores": 1.0}
    assert cost.starts == [4.0, 9.0, 8.0, 6.0] or cost.starts == [4.0, 8.0, 9.0, 6.0]
    other = engine_cost.Cost(cost.shard | {"around": 0.8, "driver": 0.3, "daemons": 0.6})
    assert engine_cost.added(cost, other, "driver") == pytest.approx((0.3 + 0.3) / 3)
    assert engine_cost.added(cost, other, "driver", "daemons") == pytest.approx(0.4)
    (tmp_path / "scores-3").write_text("6.0 6.0 9.0 9.0\n")
    with pytest.raises(RuntimeError, match="scores: no worker made two shards"):
        engine_cost.read_notes(tmp_path)


def test_processor_time_of_children_and_theirs():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: sum(range(1000))'])"
    before = descendants(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as child:
        deadline = time.monotonic() + 60
        while not any(seconds > 0.05 for seconds in spent(before, descendants(os.getpid())).values()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert child.pid in descendants(os.getpid()) and len(descendants(child.pid)) == 1
        os.killpg(child.pid, 9)
    assert child.pid not in descendants(os.getpid())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")
def test_pools_of_both_engines_are_compared(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATHS)
    sizes = {"prompts": 3, "candidates": 2, "prompts_per_shard": 1, "workers": 1, "runs": 1, "files": 20}
    engine_cost.main([f"--{name}={size}" for name, size in (sizes | {"threads": 1}).items()])
    told = capsys.readouterr().out
    assert "3 shards of 2 images, 1 workers" in told and "the pools are equal to the byte" in told
    for name in ("text", "latents", "scores", "around"):
        local, ray = re.search(rf"^{name} +([\d.]+) +([\d.]+)", told, re.MULTILINE).groups()
        assert float(local) > 0 and float(ray) > 0
    assert re.search(r"added, in all: -?\d+\.\d%", told) and "3 starts in 1 runs" in told

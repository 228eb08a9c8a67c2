"""Pools filled by workers on a Ray cluster of this machine: real processes, real faults."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from capo.data.engines import LocalEngine
from capo.data.engines.on_ray import RayEngine
from capo.data.engines.ray_cluster import LOOPBACK
from capo.data.engines.schedule import Room
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import make_prompt
from capo.errors import InputError, Unfinished
from fixtures.fake_backbone import FakeBackbone
from fixtures.faulty_stages import REWARD, SETTINGS, FaultyStages
from fixtures.ray_clusters import MARKS, PATHS, ray_cluster

pytestmark = MARKS
ROOMS = {"text": Room(1, 1), "latents": Room(1, 1), "scores": Room(1, 1)}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster of three simulated processors for all tests here."""
    answer = signal.getsignal(signal.SIGTERM)
    with ray_cluster(3) as ray:
        assert signal.getsignal(signal.SIGTERM) is answer  # training's, which keeps its last step
        yield ray


@pytest.fixture
def spec(tmp_path):
    """Twelve prompts in six rows, 10 candidates in two shards each."""
    prompts = [make_prompt(f"prompt {number}") for number in range(12)]
    return PoolSpec(tmp_path / "ray", "tiny", "train", 5, prompts, candidates=10, prompts_per_shard=2)


def fill(spec, engine, rewards=(REWARD,)):
    return fill_pool(spec, ImageGenerator.base(FakeBackbone(), SETTINGS, engine), rewards, progress=False)


def contents(pool):
    files = (path for path in pool.folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(pool.folder)): path.read_bytes() for path in files}


@pytest.fixture
def expected(spec, tmp_path):
    return contents(fill(replace(spec, root=tmp_path / "local"), LocalEngine()))


def engine(tmp_path, rooms=ROOMS, start_limit=300.0, **fault):
    marks = tmp_path / "marks"
    marks.mkdir(exist_ok=True)
    return RayEngine(FaultyStages(marks, **fault), "local", 3, start_limit, 1, rooms)


def workers(tmp_path, stage):
    return len(list((tmp_path / "marks").glob(f"{stage}-*")))


def test_two_workers_a_stage_make_the_same_pool_to_the_byte(spec, tmp_path, expected):
    two = {stage: Room(0.5, 2) for stage in ROOMS}
    pool = fill(spec, engine(tmp_path, two, together=2))
    assert contents(pool) == expected
    assert workers(tmp_path, "latents") == 2


@pytest.mark.parametrize("fault", ["kill", "raise", "full"])
def test_a_fault_that_passes_leaves_no_trace(spec, tmp_path, expected, fault):
    pool = fill(spec, engine(tmp_path, fault=fault))
    assert contents(pool) == expected
    assert workers(tmp_path, "latents") == (3 if fault == "kill" else 1)  # both shards of the row kill one


def test_a_local_cluster_listens_on_the_loopback_address(cluster):
    assert [node["NodeManagerAddress"] for node in cluster.nodes()] == ["127.0.0.1"]


def test_a_truncated_shard_is_made_again(spec, tmp_path, expected):
    pool = fill(spec, LocalEngine())
    shard = pool.folder / "latents" / "00003-01.safetensors"
    shard.write_bytes(shard.read_bytes()[:-20])
    assert contents(fill(spec, engine(tmp_path))) == expected


@pytest.mark.parametrize(
    ("fault", "said", "tries"),
    [
        ("kill", "its worker's process ended", 3),
        ("raise", "RuntimeError on .*: the device fell off", 3),
        ("nan", r"reward 'brightness' gave nan for shard 00001-00 \(on ", 1),
    ],
)
def test_a_shard_that_always_fails_holds_up_its_own_scores_alone(
    spec, tmp_path, expected, fault, said, tries, caplog
):
    one = replace(spec, candidates=8)  # one shard a row: 6 of text, 6 of latents, 6 of scores
    told = rf"16 of 18 files are made; 1 failed\n  latents 00001-00: {said}(.|\n)*\n  1 more wait for them"
    with pytest.raises(Unfinished, match=told):
        fill(one, engine(tmp_path, fault=fault, once=False))
    # each try kills a worker; a row whose text is late may need one more after the third
    assert workers(tmp_path, "latents") in ((3, 4) if fault == "kill" else (1,))
    files = {path.name for path in (spec.root).rglob("latents/*")}
    assert files == {f"{row:05d}-00.safetensors" for row in range(6) if row != 1}
    pool = fill(one, LocalEngine())  # another engine makes what is left
    assert len(list(pool.folder.rglob("scores/*/*"))) == 6


def test_a_worker_that_does_not_start_in_time(spec, tmp_path):
    with pytest.raises(Unfinished, match=r"no worker can start: it was not ready within 1 s"):
        fill(spec, engine(tmp_path, start_limit=1.0, loading=60.0))


def test_another_pool_in_the_folder_is_refused_by_the_worker(spec, tmp_path):
    class Elsewhere(FaultyStages):
        def __call__(self, order):
            shutil.move(order.folder / "manifest.json", order.folder / "moved")
            return super().__call__(order)

    marks = tmp_path / "marks"
    marks.mkdir()
    with pytest.raises(Unfinished, match=r"set pool\.root to a folder that all machines share"):
        fill(spec, RayEngine(Elsewhere(marks), "local", 3, 300.0, 1, ROOMS))


def test_more_devices_than_the_cluster_has(spec, tmp_path):
    with pytest.raises(InputError, match=r"latents.devices=9, but the Ray cluster has 3 times 1 cores"):
        fill(spec, engine(tmp_path, ROOMS | {"latents": Room(9)}))


DRIVER = """
import sys
from pathlib import Path
from capo.data.engines.on_ray import RayEngine
from capo.data.engines.schedule import Room
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import make_prompt
from fixtures.fake_backbone import FakeBackbone
from fixtures.faulty_stages import REWARD, SETTINGS, FaultyStages

root, marks = map(Path, sys.argv[1:3])
marks.mkdir(exist_ok=True)
prompts = [make_prompt(f"prompt {number}") for number in range(12)]
spec = PoolSpec(root, "tiny", "train", 5, prompts, candidates=10, prompts_per_shard=2)
rooms = {"text": Room(1, 1), "latents": Room(1, 1), "scores": Room(1, 1)}
engine = RayEngine(FaultyStages(marks, pause=1.0), sys.argv[3], 3, 300.0, 1, rooms)
fill_pool(spec, ImageGenerator.base(FakeBackbone(), SETTINGS, engine), [REWARD], progress=False)
"""


def driver(spec, tmp_path, address="local", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, spec.root, tmp_path / "marks", address],
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_a_killed_driver_has_left_is_finished_by_the_local_engine(spec, tmp_path, expected):
    process = driver(spec, tmp_path)
    deadline = time.monotonic() + 600
    while len(list(spec.root.rglob("latents/*.safetensors"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    marks = [path for stage in ROOMS for path in (tmp_path / "marks").glob(f"{stage}-*")]
    actors = [int(path.name.split("-")[1]) for path in marks]
    assert actors
    while any(os.path.exists(f"/proc/{pid}") for pid in actors):  # the actors die with their driver
        assert time.monotonic() < deadline
        time.sleep(0.1)
    left = len(list(spec.root.rglob("latents/*.safetensors")))
    assert 3 <= left < 12
    assert contents(fill(spec, LocalEngine())) == expected


def test_a_cluster_that_is_not_there(spec, tmp_path):
    process = driver(spec, tmp_path, "127.0.0.1:1")
    process.wait(300)
    assert "engine.address=127.0.0.1:1: there is no Ray cluster" in process.stderr.read()


def test_a_local_cluster_does_not_join_another_one(spec, tmp_path, expected):
    """A stale address in the environment: the worker would wait there for ever."""
    process = driver(spec, tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert process.wait(600) == 0, process.stderr.read()[-3000:]
    assert contents(fill(spec, LocalEngine())) == expected


MACHINES = """
import sys, threading, time
from dataclasses import replace
from ray.cluster_utils import Cluster
import ray
from pathlib import Path

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False)
root = Path(sys.argv[1])


def leave():
    while len(list(root.rglob("latents/*.safetensors"))) < 3:
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)


threading.Thread(target=leave, daemon=True).start()
"""


def test_a_machine_that_leaves_costs_what_it_had_begun(spec, tmp_path, expected):
    process = subprocess.run(
        [sys.executable, "-c", MACHINES + DRIVER, spec.root, tmp_path / "marks", "auto"],
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert contents(fill(spec, LocalEngine())) == expected


def test_a_wrong_token_is_named(spec, tmp_path):
    own = {"RAY_AUTH_MODE": "token", "PYTHONPATH": PATHS}
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["start", "--head", "--block", f"--port={address.split(':')[1]}", "--num-cpus=1"]
    short = tempfile.mkdtemp(prefix="ray")  # a socket's path may have 107 characters
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")),
            *command,
            "--include-dashboard=false",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={short}",
        ],
        env={**os.environ, **own, "RAY_AUTH_TOKEN": "a" * 32, LOOPBACK: "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert any("Ray runtime started" in line for line in head.stdout)
        process = driver(spec, tmp_path, address, **own, RAY_AUTH_TOKEN="b" * 32)
        process.wait(300)
        told = process.stderr.read()
        assert f"engine.address={address}: the cluster does not take this process's token" in told, told[
            -3000:
        ]
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)

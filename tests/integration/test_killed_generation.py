"""Generation in real processes.

Killed at any moment, or two at once, it leaves the pool of one that nothing disturbed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures import ROOT

# the script as typed, with a line in a log for each file that this process writes into a pool
LOGGED = """
import os, sys
import generate
from capo.data.pool import store

def logged(write, kind):
    def method(self, *args):
        write(self, *args)
        name = args[0].name if hasattr(args[0], "name") else args[1].name if kind == "scores" else args[0]
        with open(os.environ["WRITTEN"], "a") as file:
            file.write(f"{self.folder.name} {kind} {name} {args[0] if kind == 'scores' else ''}\\n")
    return method

for kind in ("text", "latents", "scores"):
    setattr(store.Pool, f"write_{kind}", logged(getattr(store.Pool, f"write_{kind}"), kind))
sys.argv[0] = generate.__file__
generate.main()
"""
SMALL = ["pool.candidates=12", "pool.prompts_per_shard=1", "sampling.batch=2", "sampling.steps=4"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generation(command_line, tmp_path_factory):
    """Starts `generate.py` into a pool root; what it writes is logged beside the root."""

    def start(root: Path) -> subprocess.Popen:
        arguments = [value for value in command_line if not value.startswith(("pool.", "sampling."))]
        paths = f"{ROOT / 'src'}:{ROOT}:{ROOT / 'tests'}"
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                LOGGED,
                "--config-path",
                str(ROOT / "conf"),
                *arguments,
                *SMALL,
                f"pool.root={root}",
                f"hydra.run.dir={root.parent / 'hydra'}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "WRITTEN": str(root.parent / "written.txt"),
            },
        )

    return start


@pytest.fixture(scope="module")
def undisturbed(generation, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed") / "pools"
    finish(generation(root))
    return root


def finish(process: subprocess.Popen) -> None:
    assert process.wait(900) == 0, process.stderr.read()[-3000:]


def contents(root: Path) -> dict[str, bytes]:
    """Every file but the locks.

    One of a process that was killed lies there, held by nobody, until its row is locked again.
    """
    files = (path for path in root.rglob("*") if path.is_file() and path.parent.name != ".locks")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def count(root: Path, pattern: str) -> int:
    return len(list(root.glob(pattern)))


def test_a_killed_generation_goes_on_to_the_same_pool(generation, undisturbed, tmp_path):
    root = tmp_path / "pools"
    moments = [
        lambda: count(root, "*/manifest.json") >= 1,
        lambda: count(root, "*/latents/*.safetensors") >= 2,
        lambda: any(".tmp" in path.name for path in root.rglob("*")),
        lambda: count(root, "*/latents/*.safetensors") >= 7,
        lambda: count(root, "*/scores/*/*.parquet") >= count_before + 2,
    ]
    killed = 0
    for moment in moments:
        count_before = count(root, "*/scores/*/*.parquet")
        process = generation(root)
        deadline = time.monotonic() + 600
        while not moment() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 4
    finish(generation(root))
    assert contents(root) == contents(undisturbed)
    again = contents(root)
    finish(generation(root))
    assert contents(root) == again


def test_two_processes_share_the_work(generation, undisturbed, tmp_path):
    root = tmp_path / "pools"
    processes = [generation(root), generation(root)]
    for process in processes:
        finish(process)
    written = (tmp_path / "written.txt").read_text().splitlines()
    assert (
        len(written)
        == len(set(written))
        == len((undisturbed.parent / "written.txt").read_text().splitlines())
    )
    assert contents(root) == contents(undisturbed)

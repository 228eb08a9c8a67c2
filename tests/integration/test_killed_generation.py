"""Generation in real processes.

Killed at any moment, or two at once, it leaves the pool of one that nothing disturbed.
"""

import signal
from pathlib import Path

import pytest

from fixtures import ROOT

# the script as typed, with a line in a log for each file of a stage that this process writes into a pool
LOGGED = """
import os, sys
from pathlib import Path
import generate

replace = Path.replace

def logged(self, target):
    replace(self, target)
    if {"text", "latents", "scores"} & set(target.parts):
        with open(os.environ["WRITTEN"], "a") as file:
            file.write(f"{target}\\n")

Path.replace = logged
sys.argv[0] = generate.__file__
generate.main()
"""
SMALL = ["pool.candidates=12", "pool.prompts_per_shard=1", "sampling.batch=2", "sampling.steps=4"]
# the ends of processes that follow one another
DEATHS = [
    "after manifest.json 1", "before text/* 1", "after latents/* 2", "before latents/* 1",
    "after latents/* 3", "before scores/*/* 1", "after scores/*/* 2",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generation(helper, command_line, tmp_path_factory):
    """Starts `generate.py` into a pool root; what it writes is logged beside the root."""
    script = tmp_path_factory.mktemp("script") / "logged.py"
    script.write_text(LOGGED)
    arguments = [value for value in command_line if not value.startswith(("pool.", "sampling."))]

    def start(root: Path, death: str = ""):
        places = [f"pool.root={root}", f"hydra.run.dir={root.parent / 'hydra'}"]
        given = ["--config-path", ROOT / "conf", *arguments, *SMALL, *places]
        return helper.start(script, *given, ends=death, WRITTEN=str(root.parent / "written.txt"))

    return start


@pytest.fixture(scope="module")
def undisturbed(generation, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed") / "pools"
    finish(generation(root))
    return root


def finish(process) -> None:
    assert process.wait() == 0, process.error[-3000:]


def contents(root: Path) -> dict[str, bytes]:
    """Every file but the locks.

    One of a process that was killed lies there, held by nobody, until its row is locked again.
    """
    files = (path for path in root.rglob("*") if path.is_file() and path.parent.name != ".locks")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_killed_generation_goes_on_to_the_same_pool(generation, undisturbed, tmp_path):
    root = tmp_path / "pools"
    for death in DEATHS:
        process = generation(root, death)
        assert process.wait() == -signal.SIGKILL, f"{death}: {process.error[-3000:]}"
        assert any(".tmp" in path.name for path in root.rglob("*")) == death.startswith("before")
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
    alone = (undisturbed.parent / "written.txt").read_text().splitlines()
    assert len(written) == len(set(written)) == len(alone)
    assert contents(root) == contents(undisturbed)

"""Runs in rounds as real processes: killed in the second round, and in two processes."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from capo.cli.resolvers import shipped
from fixtures import ROOT

CODE = """
import sys
from omegaconf import OmegaConf
from capo.cli import train
from capo.cli.messages import plain_errors

with plain_errors():
    train.run(OmegaConf.load(sys.argv[1]))
"""
ROUNDS = [
    "online.every=10",
    "trainer.max_steps=20",
    "trainer.checkpoint_every=1",
    "trainer.log_every=1",
    "validation.every=10",
    "pool.candidates=12",
    "pool.prompts_per_shard=1",
    "sampling.batch=2",
    "evaluate=false",
]
SECOND = Path("online") / "step000010"

pytestmark = pytest.mark.slow


def start(tiny_run, name: str, *overrides: str, processes: int = 1) -> subprocess.Popen:
    path, script = tiny_run.folder / f"{name}.yaml", tiny_run.folder / "run.py"
    OmegaConf.save(tiny_run(name, *ROUNDS, *overrides), path, resolve=True)
    script.write_text(CODE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), str(script), str(path)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    told, _ = process.communicate(timeout=900)
    assert process.returncode == 0, told[-4000:]
    return told


def killed_when(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[0][-4000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[str, bytes]:
    """Files but locks and notes of what was verified."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.parent.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_run_killed_in_its_second_round_goes_on_to_the_same_pool_and_weights(tiny_run):
    """Killed while the policy draws, while its images are scored, and between two steps after that."""
    finish(start(tiny_run, "unkilled"))
    killed, unkilled = tiny_run.folder / "killed", tiny_run.folder / "unkilled"
    last, second = killed / "checkpoints" / "last.ckpt", killed / SECOND

    def trained() -> bool:
        report = second / "calibration" / "calibration.html"
        return report.exists() and last.stat().st_mtime_ns > report.stat().st_mtime_ns

    for happened in (
        lambda: len(list(second.glob("*/latents/*.safetensors"))) >= 1,
        lambda: len(list(second.glob("*/scores/*/*.parquet"))) >= 1,
        trained,
    ):
        killed_when(start(tiny_run, "killed"), happened)
        assert not (killed / "outcome.json").exists()
    finish(start(tiny_run, "killed"))
    one, other = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (killed, unkilled)
    )
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    pools = contents(killed / "online")
    assert pools == contents(unkilled / "online") and any("latents" in name for name in pools)
    for name in ("metrics.csv", "rounds.csv"):
        assert table(killed / name) == table(unkilled / name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_draw_the_candidates_of_a_round_together(tiny_run, strategy):
    """Into one pool; pairs and losses of the second round are about those of one process."""
    shapes = [f"model.backbone.weights={shipped('unet')}", "model.name=shapes", "trainer.batch=4"]
    steps = ["online.every=3", "trainer.max_steps=6", "validation.every=3", "trainer.lr=1e-5"]
    several = [f"trainer.strategy={strategy}", "trainer.devices=auto"]
    finish(start(tiny_run, f"alone-{strategy}", *shapes, *steps))
    finish(start(tiny_run, strategy, *shapes, *steps, *several, processes=2))
    alone, shared = tiny_run.folder / f"alone-{strategy}", tiny_run.folder / strategy
    [pool] = (shared / "online" / "step000003").glob("shapes-*")
    for kind in ("text/*", "latents/*", "scores/*/*"):
        [base] = (tiny_run.folder / "pools").glob("shapes-*-0-train")
        assert sorted(path.name for path in pool.glob(kind)) == sorted(path.name for path in base.glob(kind))
    first, other = (
        [float(row["train/loss"]) for row in table(folder / "metrics.csv") if row.get("train/loss")]
        for folder in (alone, shared)
    )
    assert len(other) == 6 and other[:3] == pytest.approx(first[:3], rel=1e-4)
    assert other[3:] == pytest.approx(first[3:], rel=1e-3)
    one, two = table(alone / "rounds.csv"), table(shared / "rounds.csv")
    assert [row["prompts with a pair"] for row in two] == [row["prompts with a pair"] for row in one]

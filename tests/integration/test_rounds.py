"""Runs in rounds as real processes: killed in the second round, and in two processes."""

import csv
import signal
from pathlib import Path

import pytest
import torch

from capo.cli.resolvers import shipped
from fixtures.launched import finish, launcher

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
SHAPES = [
    f"model.backbone.weights={shipped('unet')}",
    "model.name=shapes",
    "trainer.batch=4",
    "online.every=3",
    "trainer.max_steps=6",
    "validation.every=3",
    "trainer.lr=1e-5",
]
SECOND = Path("online") / "step000010"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(helper, tiny_run):
    """Starts a run in rounds (`launcher`)."""
    return launcher(helper, tiny_run, ROUNDS)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[str, bytes]:
    """Files but locks and notes of what was verified."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.parent.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_run_killed_in_its_second_round_goes_on_to_the_same_pool_and_weights(start, tiny_run):
    """Killed while the policy draws, while its images are scored, and between two steps after that.

    Files of the first round are there by then: the run that nobody kills has filled their pools.
    """
    finish(start("unkilled"))
    killed, unkilled = tiny_run.folder / "killed", tiny_run.folder / "unkilled"
    for moment in ("after latents/* 1", "after scores/*/* 1", "after last.ckpt 2"):
        process = start("killed", ends=moment)
        assert process.wait() == -signal.SIGKILL, f"{moment}: {process.error[-3000:]}"
        assert (killed / SECOND).exists() and not (killed / "outcome.json").exists()
    report = killed / SECOND / "calibration" / "calibration.html"
    assert report.exists()  # the last moment came after the images of the round
    finish(start("killed"))
    one, other = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (killed, unkilled)
    )
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    pools = contents(killed / "online")
    assert pools == contents(unkilled / "online") and any("latents" in name for name in pools)
    for name in ("metrics.csv", "rounds.csv"):
        assert table(killed / name) == table(unkilled / name)


@pytest.fixture(scope="module")
def alone(start) -> str:
    """Name of a run on shapes in one process."""
    finish(start("alone", *SHAPES))
    return "alone"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_draw_the_candidates_of_a_round_together(start, tiny_run, alone, strategy):
    """Into one pool; pairs and losses of the second round are about those of one process."""
    finish(start(strategy, *SHAPES, f"trainer.strategy={strategy}", "trainer.devices=auto", processes=2))
    alone, shared = tiny_run.folder / alone, tiny_run.folder / strategy
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

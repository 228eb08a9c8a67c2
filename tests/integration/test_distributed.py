"""Two processes on the CPU, as torchrun starts them: the same run as one process, whatever the strategy."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from capo.cli.resolvers import shipped
from fixtures import ROOT
from fixtures.launched import finish, free_port, launcher

pytestmark = pytest.mark.slow
SHAPES = f"model.backbone.weights={shipped('unet')}"
STEPS = [
    SHAPES,
    "model.name=shapes",
    "sampling.steps=2",
    "trainer.batch=4",
    "trainer.max_steps=6",
    "trainer.log_every=1",
    "validation.every=3",
    "evaluate=false",
]
STRATEGY = {
    "ddp": ["trainer.strategy=ddp", "trainer.devices=auto"],
    "fsdp": ["trainer.strategy=fsdp", "trainer.devices=auto"],
    "micro": ["trainer.micro_batch=2"],
    "one": [],
}


@pytest.fixture(scope="module")
def start(helper, tiny_run):
    """Starts a run of the tiny pipeline (`launcher`)."""
    return launcher(helper, tiny_run, STEPS)


def curves(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {name: float(value) for name, value in row.items() if value and not name.startswith("time/")}
        for row in rows
    ]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in curves(folder) if "train/loss" in row]


def moments(folder: Path) -> list[tuple[int, float, tuple[int, ...]]]:
    """Number, step and shape of what the optimizer of the last checkpoint remembers."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0][
        "state"
    ]
    return [
        (number, float(part["step"]), tuple(part["exp_avg"].shape)) for number, part in sorted(state.items())
    ]


@pytest.fixture(scope="module")
def runs(start):
    """Strategy -> what the run told; one process with one and with two batches a step, and two processes."""
    return {
        name: finish(start(name, *STRATEGY[name], processes=2 if name in ("ddp", "fsdp") else 1))
        for name in ("one", "micro", "ddp", "fsdp")
    }


@pytest.mark.parametrize("name", ["micro", "ddp", "fsdp"])
def test_the_losses_are_those_of_one_process(tiny_run, runs, name):
    first, other = losses(tiny_run.folder / "one"), losses(tiny_run.folder / name)
    assert len(first) == 6 and other[:5] == pytest.approx(first[:5], rel=1e-4)
    assert first[0] != first[4]


@pytest.mark.parametrize("name", ["one", "micro", "ddp", "fsdp"])
def test_the_first_margin_is_zero_everywhere(runs, name):
    # the largest over all processes, so that 0 is 0 in each
    assert re.search(r"largest \|h\| of the first batch: (\S+),", runs[name])[1] == "0"


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_validation_is_that_of_all_processes_together(tiny_run, runs, name):
    alone, shared = (
        [row for row in curves(tiny_run.folder / run) if "val/win_rate" in row] for run in ("one", name)
    )
    assert [row["step"] for row in shared] == [3, 6]
    for one, other in zip(alone, shared, strict=True):  # of two prompts each process has seen one
        for column in ("val/score/r", "val/score/g"):
            assert other[column] == pytest.approx(one[column], abs=2e-3)
    assert (tiny_run.folder / name / "validation" / "step000006.png").is_file()
    assert (tiny_run.folder / name / "policy" / "model_index.json").is_file()


def test_a_checkpoint_of_one_strategy_goes_on_in_another(tiny_run, runs, start):
    """DDP's in FSDP, FSDP's in one process, and a single process's in itself, which the others must equal."""
    for name, strategy in (("ddp", "fsdp"), ("fsdp", "one"), ("one", "micro")):
        shutil.copytree(tiny_run.folder / name, tiny_run.folder / f"{name}-on")
        processes = 2 if strategy == "fsdp" else 1
        finish(start(f"{name}-on", *STRATEGY[strategy], "trainer.max_steps=8", processes=processes))
    first = losses(tiny_run.folder / "one-on")
    assert len(first) == 8
    for name in ("ddp-on", "fsdp-on"):
        assert losses(tiny_run.folder / name) == pytest.approx(first, rel=1e-3)
        assert moments(tiny_run.folder / name) == moments(tiny_run.folder / "one-on")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_ends_all_and_the_run_goes_on(tiny_run, runs, start, strategy):
    """Rank 1 is killed in step 5; the same command then ends as a run that nothing has cut off."""
    killed = f"killed-{strategy}"
    process = start(killed, *STRATEGY[strategy], processes=2, kill_at=4)
    assert (
        process.wait() != 0
    )  # told is the first fault that torchrun sees: the kill, or what rank 0 makes of it
    assert not (tiny_run.folder / killed / "outcome.json").exists()
    finish(start(killed, *STRATEGY[strategy], processes=2))
    assert curves(tiny_run.folder / killed) == curves(tiny_run.folder / strategy)


def test_a_sharded_adapter_trains_like_a_whole_one(tiny_run, start):
    lora = ["+model.lora.rank=2", "+model.lora.alpha=2", "trainer.lr=0.01"]
    finish(start("lora", *lora))
    told = finish(start("lora-fsdp", *lora, *STRATEGY["fsdp"], processes=2))
    assert re.search(r"largest \|h\| of the first batch: (\S+),", told)[1] == "0"
    assert losses(tiny_run.folder / "lora-fsdp") == pytest.approx(losses(tiny_run.folder / "lora"), rel=1e-4)
    finish(start("lora-fsdp", *lora, "trainer.max_steps=7"))  # and its checkpoint goes on in one process
    assert (tiny_run.folder / "lora-fsdp" / "policy" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("lora", [[], ["+model.lora.rank=2", "+model.lora.alpha=2"]], ids=["full", "lora"])
def test_a_sharded_policy_is_validated_with_the_base_like_a_whole_one(tiny_run, start, lora):
    guided = ["sampling.unconditional=base", "trainer.lr=0.001", "trainer.max_steps=3", *lora]
    alone, shared = f"guided-{len(lora)}", f"guided-{len(lora)}-fsdp"
    finish(start(alone, *guided))
    finish(start(shared, *guided, *STRATEGY["fsdp"], processes=2))
    for one, other in zip(curves(tiny_run.folder / alone), curves(tiny_run.folder / shared), strict=True):
        assert other.get("val/score/r") == pytest.approx(one.get("val/score/r"), abs=2e-3)


def test_a_sharded_mmdit_trains_like_a_whole_one(tiny_run, start):
    """The rectified flow's own classes, split over two processes.

    Losses, first margin, and a pipeline in the end.
    """
    flow = ["model=shapes_mmdit", f"model.backbone.weights={shipped('mmdit')}", "trainer.max_steps=3"]
    finish(start("flow", *flow))
    told = finish(start("flow-fsdp", *flow, *STRATEGY["fsdp"], processes=2))
    assert re.search(r"largest \|h\| of the first batch: (\S+),", told)[1] == "0"
    first, other = losses(tiny_run.folder / "flow"), losses(tiny_run.folder / "flow-fsdp")
    assert len(first) == 3 and first[0] != first[2] and other == pytest.approx(first, rel=1e-4)
    assert (tiny_run.folder / "flow-fsdp" / "policy" / "transformer" / "config.json").is_file()


def test_the_evaluation_after_two_processes_is_made_once(tiny_run):
    """On torchrun's command line."""
    path, script = tiny_run.folder / "evaluated.yaml", tiny_run.folder / "evaluated.py"
    OmegaConf.save(
        tiny_run("evaluated", *STEPS, *STRATEGY["ddp"], "trainer.max_steps=3", "evaluate=true"),
        path,
        resolve=True,
    )
    script.write_text(
        "import sys\nfrom omegaconf import OmegaConf\nfrom capo.cli import train\n"
        "train.run(OmegaConf.load(sys.argv[1]))\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tiny_run.folder / "evaluated"
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert set(results["win_rate"]) == {"r"} and (folder / "evaluation" / "report.html").is_file()
    assert done.stdout.count("win-rate %") == 1


TOGETHER = [
    "+model.lora.rank=2",
    "+model.lora.alpha=2",
    "trainer.lr=0.01",
    "trainer.precision=bf16-mixed",
    "trainer.micro_batch=1",
    "trainer.gradient_checkpointing=true",
    "trainer.max_steps=3",
]


@pytest.fixture(scope="module")
def half(tiny_run, start):
    """Losses of one process: bf16 over float32 masters, two micro-batches, activations made again."""
    finish(start("half", *TOGETHER))
    return losses(tiny_run.folder / "half")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_half_precision_accumulation_checkpointing_and_an_adapter_go_together(
    tiny_run, start, half, strategy
):
    """As one process with the same settings."""
    shared = f"half-{strategy}"
    told = finish(start(shared, *TOGETHER, *STRATEGY[strategy], processes=2))
    assert re.search(r"largest \|h\| of the first batch: (\S+),", told)[1] == "0"
    assert losses(tiny_run.folder / shared) == pytest.approx(half, rel=2e-2)
    assert (tiny_run.folder / shared / "policy" / "pytorch_lora_weights.safetensors").is_file()

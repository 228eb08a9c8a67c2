"""The embedded default with its shipped weights: the main job in small, and its promises to the bit."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from capo.data.pool import Pool
from capo.data.prompts import candidate_seed

pytestmark = pytest.mark.slow
SMALL = [
    "experiment=quick",
    "trainer.max_steps=8",
    "trainer.batch=8",
    "validation.every=4",
    "prompts.train=16",
    "prompts.test=16",
    "pool.candidates=4",
]


@pytest.fixture(scope="module")
def run(helper):
    """Runs a script in the directory of its last override; returns what it printed."""

    def finish(script: str, *overrides: str) -> str:
        process = helper.start(script, *overrides, cwd=Path(overrides[-1].split("=", 1)[1]))
        assert process.wait() == 0, process.error[-3000:]
        return process.output

    return finish


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Two runs of one seed with different loader workers, in one pool root; the folder that holds both."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, workers in (("first", 0), ("second", 2)):
        (folder / name).mkdir()
        run(
            "train.py",
            *SMALL,
            f"data.workers={workers}",
            f"pool.root={folder / 'pools'}",
            f"hydra.run.dir={folder / name}",
        )
    return folder


@pytest.fixture(scope="module")
def flow(run, tmp_path_factory):
    """The folder of the same run on the rectified flow."""
    folder = tmp_path_factory.mktemp("flow")
    run("train.py", *SMALL, "model=shapes_mmdit", f"pool.root={folder / 'pools'}", f"hydra.run.dir={folder}")
    return folder


def test_same_seed_same_bytes(runs):
    first, second = (
        (runs / name / "evaluation" / "results.json").read_bytes() for name in ("first", "second")
    )
    assert first == second
    found = json.loads(first)
    assert set(found["win_rate"]) == set(found["zero"]) == {"alignment", "looks", "preference"}
    assert {"alignment", "looks"} <= set(found["oracle"]) and found["prompts"] == 16


def test_the_rectified_flow_takes_the_whole_path(flow):
    found = json.loads((flow / "evaluation" / "results.json").read_text())
    assert set(found["win_rate"]) == set(found["zero"]) == {"alignment", "looks", "preference"}
    assert found["prompts"] == 16 and all(0 <= rate["mean"] <= 1 for rate in found["win_rate"].values())
    with (flow / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) >= 1 and np.isfinite(losses).all()
    assert (flow / "validation" / "step000008.png").is_file() and (
        flow / "evaluation" / "report.html"
    ).is_file()


@pytest.mark.parametrize("model", ["unet", "mmdit"])
def test_the_plain_pipeline_draws_the_images_of_the_evaluation(request, model):
    folder = request.getfixturevalue("runs") / "first" if model == "unet" else request.getfixturevalue("flow")
    parts = {"text_encoder_3": None, "tokenizer_3": None} if model == "mmdit" else {}
    pipe = DiffusionPipeline.from_pretrained(
        folder / "policy", dtype=torch.float32, use_safetensors=True, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    pool = Pool.open(next((folder / "evaluation" / "pool").glob("*/manifest.json")).parent)
    settings = json.loads((folder / "evaluation" / "settings.json").read_text())
    shard = pool.shards(settings["images_per_prompt"])[0]
    prompts = pool.row_prompts(shard.row)
    seeds = [
        candidate_seed(settings["seed"], prompt.id, index) for prompt in prompts for index in shard.candidates
    ]
    call = {
        "prompt": [prompt.text for prompt in prompts],
        "num_images_per_prompt": len(shard.candidates),
        "num_inference_steps": settings["steps"],
        "guidance_scale": settings["guidance"],
        **({"max_sequence_length": 4} if model == "mmdit" else {}),
    }
    latents = pipe(
        **call, generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="latent"
    ).images
    stored = pool.read_latents(shard).flatten(0, 1)
    assert torch.equal(latents.half(), stored)
    images = pipe(**call, generator=[torch.Generator().manual_seed(s) for s in seeds]).images
    with torch.no_grad():
        raw = stored.float() / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)
        decoded = pipe.vae.decode(raw, return_dict=False)[0]
    ours = pipe.image_processor.postprocess(decoded, output_type="pil")
    apart = np.abs(
        np.stack([np.asarray(i, dtype=int) for i in images])
        - np.stack([np.asarray(i, dtype=int) for i in ours])
    )
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.03


def test_two_runs_compare_head_to_head(run, runs):
    told = run("evaluate.py", f"runs=[{runs / 'first'},{runs / 'second'}]", f"hydra.run.dir={runs}")
    assert "against" in told and "50.0" in told  # the same policy twice


def test_the_papers_betas_give_a_curve_and_a_warning(run, runs, tmp_path):
    """`python train.py -m objective.beta=300,500,1000` as it is typed, with fewer images and steps.

    These betas have been measured on the model; a further one has not.
    """
    sweep = tmp_path / "sweep"
    sweep.mkdir()  # it is the working directory, too
    small = [value for value in SMALL if "max_steps" not in value] + ["trainer.max_steps=4"]
    told = run(
        "train.py",
        "-m",
        "objective.beta=300,500,1000,2000",
        *small,
        f"pool.root={runs / 'pools'}",
        f"hydra.sweep.dir={sweep}",
    )
    with (sweep / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["objective.beta"], row["status"]) for row in rows] == [
        ("300", "finished"),
        ("500", "finished"),
        ("1000", "finished"),
        ("2000", "finished"),
    ]
    assert (sweep / "sweep.png").is_file()
    warnings = [
        beta
        for beta in (300, 500, 1000, 2000)
        if f"objective.beta={beta} lies outside 300-1000" in " ".join(told.split())
    ]
    assert warnings == [2000]

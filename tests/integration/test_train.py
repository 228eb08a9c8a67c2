"""The whole path on a tiny pipeline of the real classes, in process."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from capo.cli import evaluate as evaluate_script
from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.errors import InputError
from fixtures.fake_rewards import BRIGHTNESS

FAST = {("capo", "frs"), ("dpo", "random"), ("ipo", "sum"), ("sft", "best_worst")}


@pytest.mark.parametrize(
    ("objective", "pairs"),
    [
        pytest.param(*choice, marks=[] if choice in FAST else [pytest.mark.slow])
        for choice in itertools.product(("dpo", "ipo", "capo", "sft"), ("best_worst", "sum", "frs", "random"))
    ],
)
def test_every_objective_runs_with_every_selection(tiny_run, objective, pairs):
    name = f"{objective}-{pairs}"
    cfg = tiny_run(
        name,
        f"objective={objective}",
        f"pairs={pairs}",
        "evaluate=false",
        rewards=1 if pairs == "best_worst" else 2,
    )
    win_rate = train_script.run(cfg)
    assert 0 <= win_rate <= 1
    outcome = json.loads((tiny_run.folder / name / "outcome.json").read_text())
    assert outcome["val/win_rate"] == win_rate
    assert (tiny_run.folder / name / "policy" / "model_index.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (["objective=hinge"], "independent for winner and loser"),
        (["objective=kto"], "independent for winner and loser"),
        (["objective=mapo", "noise.shared=true"], "shared by winner and loser"),
        (["objective=sdpo", "noise.shared=true"], "shared by winner and loser"),
        (["objective=capo_group", "selection.group=3", "trainer.pinned=0.2"], "independent"),
        (["objective=capo_group", "noise.times_per_pair=2"], "independent"),
        (["experiment=self_npo"], "| objective | sft |"),
        (["objective=kto", "selection.group=3", "selection.swap=true"], "| negative model |"),
        (["experiment=pnapo"], "that from which each candidate was sampled"),
        (
            ["experiment=inpo", "noise.inversion.steps=2"],
            "inverted by the policy in 2 steps with 0 corrections",
        ),
    ],
)
def test_a_whole_run_with_each_way_to_read_candidates_and_noise(tiny_run, choice, told):
    name = "-".join(choice).replace("=", "-").replace(".", "-")
    train_script.run(tiny_run(name, "noise.shared=false", *choice, "evaluate=false"))
    with (tiny_run.folder / name / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 2 and all(abs(loss) < 1e6 for loss in losses)
    assert told in (tiny_run.folder / name / "policy" / "README.md").read_text()


def test_best_worst_refuses_several_rewards(tiny_run):
    with pytest.raises(InputError, match="best_worst"):
        train_script.run(tiny_run("refused", "pairs=best_worst"))
    assert not (tiny_run.folder / "refused" / "checkpoints").exists()


@pytest.fixture(scope="module")
def finished(tiny_run):
    """A whole run with its evaluation."""
    cfg = tiny_run("finished")
    train_script.run(cfg)
    return tiny_run.folder / "finished"


def test_a_run_directory_holds_what_it_should(finished):
    for name in (
        "config.yaml",
        "metrics.csv",
        "outcome.json",
        "checkpoints/last.ckpt",
        "validation/step000000.png",
        "validation/step000002.png",
        "evaluation/results.json",
        "evaluation/report.html",
        "policy/README.md",
    ):
        assert (finished / name).is_file(), name
    assert "${" not in (finished / "config.yaml").read_text()
    columns = (finished / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        "train/loss",
        "train/h",
        "train/beta_h",
        "train/dR",
        "train/saturated",
        "train/accuracy",
        "train/drift_winner",
        "train/drift_loser",
        "train/gradient_norm",
        "time/pairs_per_second",
        "val/win_rate",
        "val/win_rate/r",
    } <= set(columns)


def test_the_policy_is_an_ordinary_pipeline(finished):
    pipe = StableDiffusionXLPipeline.from_pretrained(
        finished / "policy", dtype=torch.float32, use_safetensors=True
    )
    best = max((finished / "checkpoints").glob("0*.ckpt"))
    weights = torch.load(best, weights_only=True)["state_dict"]
    assert weights.keys() == {f"policy.{name}" for name in pipe.unet.state_dict()}
    assert all(
        torch.equal(value, weights[f"policy.{name}"]) for name, value in pipe.unet.state_dict().items()
    )


def test_a_second_run_of_the_same_seed_gives_the_same_bytes(tiny_run, finished):
    train_script.run(tiny_run("again", "data.workers=2"))
    other = tiny_run("other", "seed=1")
    train_script.run(other)
    results = {
        name: (tiny_run.folder / name / "evaluation" / "results.json").read_bytes()
        for name in ("finished", "again", "other")
    }
    assert results["finished"] == results["again"] != results["other"]


def test_evaluation_of_a_finished_run_is_skipped_or_renewed(tiny_run, finished):
    results = finished / "evaluation" / "results.json"
    before = results.stat().st_mtime_ns
    # this run's rewards come from the test itself, which its own config.yaml may not call without being
    # trusted
    cfg = tiny_run("unused", f"run={finished}", config="evaluate")
    with pytest.raises(InputError, match=rf"trust=\[{BRIGHTNESS}\]"):
        evaluate_script.run(cfg, [], finished)
    cfg.trust = [BRIGHTNESS]
    evaluate_script.run(cfg, [], finished)
    assert results.stat().st_mtime_ns == before
    cfg.evaluation.images = 3
    found = evaluate_script.run(cfg, ["evaluation.images=3"], finished)
    assert found["images_per_prompt"] == 3 and json.loads(results.read_text()) == found
    cfg.evaluation.images = 2
    evaluate_script.run(cfg, ["evaluation.images=2"], finished)


def test_lora_trains_and_exports_an_adapter(tiny_run):
    cfg = tiny_run("lora", "+model.lora.rank=2", "+model.lora.alpha=2", "evaluate=true")
    train_script.run(cfg)
    assert (tiny_run.folder / "lora" / "policy" / "pytorch_lora_weights.safetensors").is_file()
    checkpoint = torch.load(tiny_run.folder / "lora" / "checkpoints" / "last.ckpt", weights_only=True)[
        "state_dict"
    ]
    assert checkpoint and all("lora_" in name for name in checkpoint)  # what is frozen is not kept


def test_a_run_exports_what_its_keys_say(tiny_run):
    lora = ("+model.lora.rank=2", "+model.lora.alpha=2")
    train_script.run(tiny_run("file", *lora, "export=single_file"))
    policy = tiny_run.folder / "file" / "policy"
    assert {path.name for path in policy.iterdir()} == {
        "README.md",
        "base.json",
        "checkpoint.safetensors",
        "comfyui_lora.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    text = (policy / "README.md").read_text()  # as the evaluation has rewritten it
    assert "## In other programs" in text and "Not evaluated." not in text
    train_script.run(tiny_run("half", *lora, "evaluate=false", "export=full", "export_dtype=bfloat16"))
    [file] = (tiny_run.folder / "half" / "policy" / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "lora",
    [[], pytest.param(["+model.lora.rank=2", "+model.lora.alpha=2"], marks=pytest.mark.slow)],
    ids=["full", "lora"],
)
def test_an_objective_on_predictions_trains_as_its_twin_on_errors(tiny_run, lora):
    def losses(name: str, target: str) -> list[float]:
        cfg = tiny_run(
            name, "evaluate=false", "trainer.lr=1e-3", "trainer.max_steps=3", "trainer.warm_up=0", *lora
        )
        cfg.objective._target_ = target
        train_script.run(cfg)
        with (tiny_run.folder / name / "metrics.csv").open() as rows:
            return [float(row["train/loss"]) for row in csv.DictReader(rows) if row["train/loss"]]

    kind = "adapter" if lora else "full"
    expected = losses(f"errors-{kind}", "capo.objectives.capo")
    found = losses(f"predictions-{kind}", "fixtures.fake_objectives.capo_from_predictions")
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-3)
    assert found[2] != pytest.approx(found[0], rel=1e-2)  # it has moved


def test_generate_makes_every_pool_that_training_needs(tiny_run, capsys):
    cfg = tiny_run("unused", "stage=all", "pool.seed=7", config="generate")
    generate_script.run(cfg)
    pools = {folder.name for folder in (tiny_run.folder / "pools").glob("tiny-*-7-train")}
    assert len(pools) == 1
    with pytest.raises(InputError, match="stage=paint"):
        cfg.stage = "paint"
        generate_script.run(cfg)


def test_nothing_to_evaluate_is_an_error(tiny_run):
    with pytest.raises(InputError, match="run=DIR"):
        evaluate_script.run(tiny_run("unused", config="evaluate"), [], Path("."))

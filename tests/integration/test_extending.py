"""The recipes of docs/extending.md, followed to the letter on a small scale.

Files are written as printed, and commands run as printed.
"""

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from capo.backbones.sampling import SamplerSettings, candidate_generators, candidate_noise, sample
from capo.data.pool import Pool
from fixtures import ROOT

GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILE = re.compile(r'```\w+ title="([^"]+)"\n(.*?)```', re.DOTALL)
COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)
# what a command does not say itself, so that it takes seconds
SMALL = {
    "prompts.train": 4, "prompts.validation": 2, "prompts.test": 2, "pool.candidates": 4, "sampling.steps": 2,
    "trainer.max_steps": 2, "trainer.batch": 2, "validation.every": 2, "validation.images": 2,
    "evaluation.images": 2, "evaluation.zero_prompts": 2, "evaluation.oracle": "null", "threads": 1,
    "hydra.run.dir": "run",
}  # fmt: skip


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> Path:
    """Images of the base, which most recipes share."""
    return tmp_path_factory.mktemp("pools")


@pytest.fixture
def recipe(tmp_path, monkeypatch, drawn_once, pools):
    """A folder with every file of the guide.

    Returns what runs the commands of a section there, and the run's directory.
    """
    for name, text in FILE.findall(GUIDE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def follow(title: str, *more: str) -> Path:
        (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE)
        given = {"pool.root": f"pool.root={pools}"} | {word.split("=")[0]: word for word in more}
        for line in COMMANDS.search(section)[1].splitlines():
            run_line(line, given, monkeypatch)
        return tmp_path / "run"

    yield follow
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def run_line(line: str, more: dict[str, str], monkeypatch) -> None:
    """One command of the guide, in this process: PYTHONPATH=FOLDER python SCRIPT ARGUMENTS."""
    words = shlex.split(line)
    if words[0].startswith("PYTHONPATH="):
        monkeypatch.syspath_prepend(str(Path(words.pop(0).removeprefix("PYTHONPATH=")).absolute()))
    assert words.pop(0) == "python"
    if not (ROOT / words[0]).is_file():  # the recipe's own script
        runpy.run_path(words[0], run_name="__main__")
        return
    words = [*(word for word in words if word.split("=")[0] not in more), *more.values()]
    said = {word.split("=")[0] for word in words}
    values = [f"{key}={value}" for key, value in SMALL.items() if key not in said]
    script = importlib.import_module(words[0].removesuffix(".py"))
    # a script that is imported looks for a package called conf
    monkeypatch.setattr(
        sys, "argv", [script.__file__, "--config-path", str(ROOT / "conf"), *words[1:], *values]
    )
    script.main()


def test_the_folder_is_the_one_that_the_guide_draws():
    named = {name.rsplit("/", 1)[0] for name, _ in FILE.findall(GUIDE)}
    assert named == {
        "mine",
        *(f"mine/conf/{group}" for group in ("objective", "rewards", "pairs", "prompts", "model")),
    }
    assert all(
        f"{group}/" in GUIDE.split("## ")[0]
        for group in ("objective", "rewards", "pairs", "prompts", "model")
    )


def results(run: Path) -> dict:
    return json.loads((run / "evaluation" / "results.json").read_text())


def test_an_objective(recipe, capsys):
    run = recipe("An objective", "evaluate=false")
    assert (run / "outcome.json").is_file() and re.search(
        r"objective +│ calibrated_hinge", capsys.readouterr().out
    )


def test_an_objective_without_a_beta_ends_early(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("An objective", "objective.beta=${oc.select:model.beta.calibrated_hinge,null}")
    assert "objective.beta=null: must be a finite number" in capsys.readouterr().err
    assert "objective.beta=null: must be a finite number" in GUIDE


def test_a_reward(recipe):
    assert results(recipe("A reward"))["win_rate"].keys() == {"redness"}


def test_a_pairs_strategy(recipe):
    run = recipe("A pairs strategy", "evaluate=false")
    selection = json.loads((run / "calibration" / "calibration.json").read_text())["selection"]
    assert selection["winners"] == [0, 0, 4, 0, 0]  # half of four candidates, in each of four prompts


def test_a_prompt_source(recipe):
    run = recipe("A prompt source", "evaluate=false", "pool.root=pools")
    (pool,) = (run.parent / "pools").glob("*-train")
    texts = [prompt.text for prompt, _ in Pool.open(pool).prompts]
    assert len(texts) == 4 and texts[0] == "a small red cross"  # the fifth: test and validation have two each


def test_a_model_family(recipe):
    run = recipe("A model family")
    index = json.loads((run / "policy" / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline"
    assert results(run)["win_rate"].keys() == {"redness"}
    backbone = importlib.import_module("my_family").PixArtBackbone("mine/tiny-pixart")
    prompts, seeds = ["a red star", "a small blue circle"], [3, 4]
    text = backbone.encode_prompts(prompts)
    plain = DiffusionPipeline.from_pretrained("mine/tiny-pixart")
    expected = plain(
        prompts, generator=candidate_generators(seeds), num_inference_steps=3, guidance_scale=4.5,
        height=16, width=16, use_resolution_binning=False, output_type="latent", **backbone.call_options,
    ).images  # fmt: skip
    noise = candidate_noise(seeds, backbone.latent_shape)
    assert torch.equal(sample(backbone, backbone.denoiser, text, noise, SamplerSettings(3, 4.5, 2)), expected)


def test_a_plan_for_a_model_family(recipe):
    plan = json.loads((recipe("A model family", "plan=true") / "plan.json").read_text())
    assert plan["parameters"]["denoiser"] > 0 and plan["missing here"] == []

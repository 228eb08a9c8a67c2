"""`plan=true` from the configuration to plan.json, what is missing here, and the same findings without it."""

import io
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import train as train_script
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from capo import lacking
from capo.errors import InputError
from capo.plan_stage import reward_request, run_plan

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
MODELS = ["sd15", "sd35_medium", "sd35_large"]  # which no recipe of their own has
DENOISERS = {"sdxl": 2_567_463_684, "sd3": 2_028_328_000, "sd15": 859_520_964, "sd35_medium": 2_243_171_520, "sd35_large": 8_056_627_520}
Usage = namedtuple("Usage", "total used free")


def composed(*overrides: str, folder=Path("/nowhere")):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=[f"run_dir={folder / 'run'}", f"pool.root={folder / 'pools'}", "plan=true", *overrides])


def planned(folder, *overrides: str) -> tuple[dict, str]:
    return plan_of(composed(*overrides, folder=folder))


def plan_of(cfg) -> tuple[dict, str]:
    told = io.StringIO()
    run_plan(cfg, Console(file=told, width=300))
    return json.loads((Path(cfg.run_dir) / "plan.json").read_text()), told.getvalue()


@pytest.mark.parametrize("choice", [*(f"experiment={name}" for name in RECIPES), *(f"model={name}" for name in MODELS)])
def test_every_recipe_has_a_plan_without_weights(tmp_path, choice):
    plan, told = planned(tmp_path, choice)
    if plan["model"] in DENOISERS:
        assert plan["parameters"]["denoiser"] == DENOISERS[plan["model"]]
        assert any(entry["kind"] == "weights" for entry in plan["missing here"])
    lora = plan["config"]["model"]["lora"]
    assert (plan["parameters"]["trained"] < plan["parameters"]["denoiser"] / 5) == bool(lora)
    training = plan["device"]["training"]
    assert training["reference"] == 0 if lora else training["reference"] > 0
    assert training["total"] == sum(size for part, size in training.items() if part != "total") <= plan["device"]["peak"]
    assert plan["division"]["pairs"] == plan["config"]["trainer"]["batch"] and plan["hours"]["training"] > 0
    assert plan["model"] in told and "missing here" in told
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"] and not (tmp_path / "pools").exists()


def test_nothing_is_missing_for_the_shapes(tmp_path):
    plan, told = planned(tmp_path)
    assert plan["missing here"] == [] and "nothing" in told
    assert plan["prompts"] == {"train": 256, "validation": 32, "test": 256}
    # 200 steps; validation every 50 of them: 32 x 4 images four times, beside 256 x 8 + 32 x 4 + 256 x 4 twice + 64 x 4
    assert plan["steps"] == 200 and plan["hours"]["images"] == 256 * 8 + 5 * 32 * 4 + 2 * 256 * 4 + 64 * 4
    assert plan["config"]["trainer"]["batch"] == 16


def test_a_full_disk_is_listed_by_a_plan_and_refused_by_a_run(tiny_run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 10, 10))
    plan, told = plan_of(tiny_run("full_plan", "plan=true"))
    (entry,) = plan["missing here"]
    assert entry["kind"] == "disk" and entry["certain"] and "are free there" in told
    with pytest.raises(InputError, match="are free there: make room, or set pool.root"):
        train_script.run(tiny_run("full"))
    assert not (tiny_run.folder / "full").exists()


def test_too_little_memory_is_listed_and_refused_where_it_is_certain(tiny_run, monkeypatch):
    held = plan_of(tiny_run("memory_plan", "plan=true"))[0]["device"]["training"]
    certain = sum(held[part] for part in ("weights", "gradients", "optimiser", "reference"))
    monkeypatch.setattr(lacking, "device_bytes", lambda accelerator: ("a small one", certain - 1))
    with pytest.raises(InputError, match="weights, gradients, optimiser and reference take .* which has .* \\(a small one\\)"):
        train_script.run(tiny_run("small"))
    monkeypatch.setattr(lacking, "device_bytes", lambda accelerator: ("a small one", certain))
    found = [entry["certain"] for entry in plan_of(tiny_run("memory_plan", "plan=true"))[0]["missing here"] if entry["kind"] == "memory"]
    assert found == [False]  # the activations do not fit, which is an estimate


def test_weights_and_prompts_that_are_not_there(tmp_path, tiny_run):
    cfg = tiny_run("gone", "plan=true", f"prompts.train={tmp_path / 'none.txt'}")
    OmegaConf.update(cfg, "model.backbone.weights", str(tmp_path / "nowhere"))
    OmegaConf.update(cfg, "model.name", "sdxl")
    plan, _ = plan_of(cfg)
    assert [entry["kind"] for entry in plan["missing here"]][:2] == ["weights", "prompts"]
    assert plan["prompts"]["train"] is None and plan["disk"]["pools"]["total"] is None and plan["hours"]["sampling"] is None
    assert plan["parameters"]["denoiser"] == DENOISERS["sdxl"]


def test_a_model_without_configs_is_refused(tmp_path, tiny_run):
    cfg = tiny_run("unknown", "plan=true")
    OmegaConf.update(cfg, "model.backbone.weights", "owner/name")
    with pytest.raises(InputError, match="model.published=tiny: no configs of that name"):
        plan_of(cfg)


def test_a_plan_marks_no_directory_and_a_run_starts_there(tiny_run):
    folder = tiny_run.folder / "after"
    assert train_script.run(tiny_run("after", "plan=true")) != train_script.run(tiny_run("after", "plan=true"))  # nan: no run
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    train_script.run(tiny_run("after", "evaluate=false"))
    assert (folder / "config.yaml").is_file() and (folder / "outcome.json").is_file()


def test_values_that_cannot_be_used_end_a_plan(tmp_path):
    with pytest.raises(InputError, match="planning.utilisation=1.5: must be a number above 0 and at most 1"):
        planned(tmp_path, "planning.utilisation=1.5")


def test_a_rewards_memory_is_its_yamls_and_half_of_it_in_half_precision():
    cfg = composed("rewards=[mps,vqascore,vila]", "rewards@evaluation.rewards=[pickscore]", "+rewards@validation.held_out=[clipscore]")
    found = reward_request(cfg)
    assert (found.pool, found.validation, found.evaluation) == pytest.approx((4.42e9 + 45.84e9, 45.84e9, 3.94e9))
    assert found.everything == pytest.approx((4.42 + 45.84 + 3.94 + 1.71) * 1e9) and found.unknown == ["vila"]
    half = reward_request(composed(*(f"{override}.scorer.precision=bfloat16" for override in ("rewards.vqascore", "evaluation.rewards.vqascore")),
                                   "rewards=[vqascore]", "rewards@evaluation.rewards=[vqascore]"))  # fmt: skip
    assert half.pool == half.evaluation == pytest.approx(22.92e9)

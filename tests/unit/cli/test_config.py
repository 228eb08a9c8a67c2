"""Every group composes, every target exists and takes the arguments that its file gives it."""

import inspect
import itertools
import re
import subprocess
import sys
import tomllib

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from capo.cli import study_files
from capo.cli.named_rewards import all_rewards
from capo.cli.process import prepare_process
from capo.cli.run_config import run_config
from capo.cli.schema import Evaluating, Generating, Training, check_values
from capo.cli.targets import calls, place_of
from capo.errors import InputError
from fixtures import ROOT
from fixtures.configuration import composed

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in (ROOT / "conf").iterdir()
    if folder.is_dir() and folder.name != "hydra"
}
# choices that are composed together; a model and an experiment make choices of their own, and the files of
# the others are read by other scripts
ALONE = ("model", "experiment", "import", "benchmark")
TOGETHER = [[f"{group}={name}" for name in names] for group, names in GROUPS.items() if group not in ALONE]
CHOICES = [
    *([f"{group}={name}"] for group in ALONE for name in GROUPS[group]),
    *([choice for choice in row if choice] for row in itertools.zip_longest(*TOGETHER)),
]


def test_the_groups_are_those_that_users_know():
    assert set(GROUPS) == {
        "model",
        "objective",
        "pairs",
        "rewards",
        "prompts",
        "reference",
        "trainer",
        "logger",
        "experiment",
        "import",
        "benchmark",
        "engine",
    }
    assert {"capo", "dpo", "ipo", "sft"} <= set(GROUPS["objective"])
    assert {"best_worst", "sum", "frs", "random"} <= set(GROUPS["pairs"])


@pytest.mark.parametrize("choices", CHOICES, ids=" ".join)
def test_every_target_is_registered_and_takes_its_arguments(choices):
    files = ["prompts.train=a", "prompts.validation=b", "prompts.test=c"] if "prompts=text" in choices else []
    scripts = {"import": ("generate", Generating), "benchmark": ("evaluate", Evaluating)}
    name, schema = scripts.get(choices[0].split("=")[0], ("train", Training))
    cfg = composed(*choices, *files, name=name)
    check_values(cfg, schema)
    found = list(calls(OmegaConf.to_container(cfg, resolve=True)))
    assert found
    for path, node in found:
        signature = inspect.signature(place_of(path).registered(node["_target_"]))
        arguments = {key: value for key, value in node.items() if not key.startswith("_")}
        bind = signature.bind_partial if node.get("_partial_") else signature.bind
        if node["_target_"].startswith("capo.backbones"):
            arguments["name"] = "given by the caller"
        bind(**arguments)


def test_a_model_brings_its_own_and_the_command_line_wins():
    cfg = composed("rewards=[looks]", "model=shapes_unet")
    assert list(cfg.rewards) == ["looks"]
    assert sorted(cfg.evaluation.rewards) == ["alignment", "looks", "preference"]


def test_sdxl_brings_rewards_prompts_sampler_and_trainer():
    cfg = composed("model=sdxl")
    assert list(cfg.rewards) == list(cfg.evaluation.rewards) == ["mps", "vqascore", "vila"]
    assert (cfg.prompts._target_, cfg.prompts.train.limit) == ("capo.data.prompts.split_sets", 100_000)
    # the paper, B.1 and B.2: DDIM, 50 steps, guidance 7.5; 256 pairs a step, 1000 steps of warm-up, 10 000 at
    # most; b = 1.5
    assert (cfg.model.backbone.scheduler, cfg.sampling.steps, cfg.sampling.guidance) == (
        "DDIMScheduler",
        50,
        7.5,
    )
    assert cfg.trainer.batch == 256
    assert (cfg.trainer.lr, cfg.trainer.warm_up, cfg.trainer.max_steps, cfg.noise.bias) == (
        1e-5,
        1000,
        10000,
        1.5,
    )
    for name, (low, high) in cfg.model.beta_range.items():
        assert low <= cfg.model.beta[name] <= high
    cfg = composed("model=sdxl", "rewards=looks", "prompts=shapes", "trainer.warm_up=7", "objective=dpo")
    assert list(cfg.rewards) == ["looks"] and cfg.trainer.warm_up == 7 and cfg.objective.beta == 3000


def test_each_objective_has_the_models_beta():
    for name in ("capo", "ipo", "dpo"):
        cfg = composed(f"objective={name}")
        assert cfg.objective.beta == cfg.model.beta[name]
    assert composed("objective=sft").objective.beta is None


# objective -> the one whose beta it has where none is published for it, and the published ones
BETAS = {"hinge": ("ipo", {}), "dmpo": ("dpo", {"sd15": 1000, "sdxl": 3000}), "kto": ("dpo", {"sd15": 1000})}


@pytest.mark.parametrize("model", GROUPS["model"])
def test_other_objectives_have_a_published_beta_or_that_of_their_relative(model):
    cfg = composed(f"model={model}")
    for name, (like, published) in BETAS.items():
        cfg.objective = OmegaConf.load(ROOT / "conf" / "objective" / f"{name}.yaml")
        assert cfg.objective.beta == published.get(model, cfg.model.beta[like])


def test_recipes_of_noise_name_its_source_and_a_published_beta():
    inpo, pnapo = (composed(f"experiment={name}", "model=sdxl") for name in ("inpo", "pnapo"))
    assert (inpo.noise.source, inpo.objective._target_) == ("inverted", "capo.objectives.dpo")
    assert inpo.objective.beta == 2500 and inpo.noise.inversion == {"steps": 10, "renoise": 0, "eta": 0.1}
    assert (pnapo.noise.source, pnapo.objective._target_) == ("prior", "capo.objectives.smpo")
    assert pnapo.objective.beta == pnapo.model.beta.dpo
    assert composed("experiment=pnapo", "model=sd3").objective.beta == 5000


def test_recipes_of_negative_models_swap_or_sample_away_from_the_prompt():
    for model, beta in {"sd15": 500, "sdxl": 1000, "sd3": 200}.items():  # sd3: dpo's own
        npo = composed("experiment=npo", f"model={model}")
        assert npo.selection.swap and npo.objective.beta == beta
        assert npo.objective._target_ == "capo.objectives.dpo"
    own = composed("experiment=self_npo", "trainer.max_steps=70")
    assert (own.objective._target_, own.pairs._target_) == ("capo.objectives.sft", "capo.pairs.random_pair")
    assert own.sampling.guidance < 0 and own.validation.every == 70 and not own.evaluate
    assert not own.selection.swap and not composed().selection.swap


def test_the_budget_is_slack_of_the_anchor_and_keeps_the_objective():
    cfg = composed("experiment=budget", "objective=ipo")
    assert cfg.anchor == {"weight": 1, "slack": 0.1} and cfg.objective._target_ == "capo.objectives.ipo"


def test_environment_and_project_name_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert environment["dependencies"][-1]["pip"] == project["dependencies"]
    assert environment["dependencies"][0] == f"python{project['requires-python']}"


def test_every_dependency_is_held_at_its_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lower_bounds.py"], capture_output=True, text=True, check=True
    )
    held = dict(line.split("==") for line in done.stdout.splitlines())
    extras = project["optional-dependencies"].values()
    for line in (*project["dependencies"], *(line for extra in extras for line in extra)):
        if line.startswith(("capo[", "setuptools<")):  # extras of its own, and an upper bound alone
            continue
        name, bound = line.split(",")[0].split(">=")  # each has one
        assert held[name.split("[")[0]] == bound


def test_a_study_is_served_again_where_it_was_served_first():
    study = composed(name="study").study
    assert (study.host, study.port) == (study_files.HOST, study_files.PORT)


def test_readme_holds_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^pip install -e \. && python train\.py$", text, re.M)
    assert re.search(r"^pip install -e '\.\[test\]' && pytest$", text, re.M)
    assert "python train.py objective=capo model=sdxl pairs=frs" in text


def test_code_from_a_runs_config_needs_trust(tmp_path):
    own = composed()
    OmegaConf.update(own, "rewards.alignment.scorer._target_", "elsewhere.Scorer")
    OmegaConf.save(own, tmp_path / "config.yaml", resolve=True)
    with pytest.raises(InputError, match="not a run directory"):
        run_config(tmp_path / "missing", composed(name="evaluate"), [])
    with pytest.raises(InputError, match="not finished"):
        run_config(tmp_path, composed(name="evaluate"), [])
    (tmp_path / "outcome.json").write_text("{}")
    with pytest.raises(InputError, match=r"trust=\[elsewhere.Scorer\]"):
        run_config(tmp_path, composed(name="evaluate"), [])


def test_a_runs_own_config_counts_but_for_what_is_named(tmp_path):
    OmegaConf.save(
        composed("evaluation.images=3", "sampling.steps=7"), tmp_path / "config.yaml", resolve=True
    )
    (tmp_path / "outcome.json").write_text("{}")
    named = ["evaluation.images=5"]
    own = run_config(tmp_path, composed(*named, name="evaluate"), [f"run={tmp_path}", *named])
    assert own.evaluation.images == 5 and own.sampling.steps == 7


@pytest.mark.parametrize(
    "given, processes, told, expected",
    [(3, None, "1", 3), (None, None, "1", 1), (None, "2", "1", 4), (None, None, None, 8)],
)
def test_threads_of_a_process(monkeypatch, given, processes, told, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    before = torch.get_num_threads()
    for name, value in (("LOCAL_WORLD_SIZE", processes), ("OMP_NUM_THREADS", told)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    try:
        assert prepare_process(given) == expected
    finally:
        torch.set_num_threads(before)


def test_a_reward_that_is_trained_and_evaluated_is_built_once():
    trained, evaluated, _ = all_rewards(composed("rewards=[looks]"))
    assert [reward.name for reward in evaluated] == ["alignment", "looks", "preference"]
    assert trained[0] is evaluated[1]
    other = all_rewards(composed("rewards=[looks]", "rewards.looks.scale=3"))
    assert other[0][0] is not other[1][1]


@pytest.mark.parametrize("name", ["alignment", "looks", "preference"])
def test_the_weights_of_a_reward_are_those_that_its_scorer_loads(name):
    cfg = composed(f"rewards.{name}.weights=others.safetensors")
    assert cfg.rewards[name].scorer.weights == "others.safetensors"

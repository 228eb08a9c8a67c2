"""Every line of docs/recipes.md that starts training, as Hydra reads it.

Each job composes, with values that can be used.
"""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from capo.cli.build import target_name
from capo.cli.schema import Merging, check_values
from fixtures import ROOT

TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SWEEPS = re.findall(r"^python train\.py -m (.+)$", TEXT, re.MULTILINE)
SINGLE = re.findall(r"`python train\.py ([^`]+)`", TEXT)


@pytest.fixture(scope="module")
def conf():
    with initialize_config_dir(
        str(ROOT / "conf"), version_base="1.3"
    ):  # once: files that were read stay read
        yield


def jobs(line: str) -> list[list[str]]:
    """The overrides of each job that Hydra makes of a command line."""
    (batch,) = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides(shlex.split(line)), max_batch_size=None
    )
    return batch


def test_the_lines_are_found():
    # table 1: 3 rewards x 3 objectives; table 2: 3 objectives x 2 sets of pairs, twice; table 4: 2; tables 5
    # and 6: weightings
    assert [len(jobs(line)) for line in SWEEPS] == [9, 6, 6, 2, 4, 3]
    assert len(SINGLE) >= 7 and all(len(jobs(line)) == 1 for line in SINGLE)


@pytest.mark.parametrize("line", [*SWEEPS, *SINGLE])
def test_each_job_composes_with_values_that_can_be_used(conf, line):
    for overrides in jobs(line):
        cfg = compose("train", overrides=["run_dir=run", *overrides])
        check_values(cfg)
        assert not OmegaConf.missing_keys(cfg.prompts), f"{overrides} lacks a prompt set"
        assert all(
            "_target_" in reward.scorer
            for rewards in (cfg.rewards, cfg.evaluation.rewards)
            for reward in rewards.values()
        )
        # what is trained is evaluated, as the same reward: neither its memory nor its scores are there twice
        assert all(reward == cfg.evaluation.rewards[name] for name, reward in cfg.rewards.items())


def configured(experiment, *overrides):
    """Configurations of the jobs of an experiment that is a sweep; an override takes the place of its own."""
    params = OmegaConf.load(ROOT / "conf" / "experiment" / f"{experiment}.yaml").hydra.sweeper.params
    sweep = {**params, **dict(override.split("=", 1) for override in overrides)}
    words = shlex.join(f"{key}={value}" for key, value in sweep.items())
    return [
        compose("train", overrides=["run_dir=run", f"experiment={experiment}", *job]) for job in jobs(words)
    ]


def test_the_soups_of_table_2_merge_capos_jobs_of_table_1(conf):
    lines = re.findall(r"^python merge\.py (.+)$", TEXT, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["model=sdxl", "model=sd3"]
    for line in lines:
        chosen = [jobs(SWEEPS[0])[int(number)] for number in re.findall(r"TIME/(\d+)/policy", line)]
        rewards = ["rewards=mps", "rewards=vqascore_bfloat16", "rewards=vila"]
        assert [[reward, "objective=capo"] for reward in rewards] == [job[1:] for job in chosen]
        check_values(compose("merge", overrides=["run_dir=run", *shlex.split(line)]), Merging)


def test_the_soup_of_shapes_has_a_job_for_each_reward_and_one_for_all(conf):
    assert [sorted(cfg.rewards) for cfg in configured("shapes_soup")] == [
        ["alignment"],
        ["looks"],
        ["preference"],
        ["alignment", "looks", "preference"],
    ]


def test_objectives_of_the_frontier_have_as_many_latents_in_a_step(conf):
    found = configured("frontier", "objective.beta=300", "seed=0,1")
    assert [cfg.seed for cfg in found] == [0, 1] * 6
    sizes = {target_name(cfg.objective): (cfg.selection.group, cfg.trainer.batch) for cfg in found}
    assert sizes == {**dict.fromkeys(("capo", "dpo", "ipo", "smpo", "sdpo"), (2, 32)), "capo_group": (4, 16)}


@pytest.mark.parametrize(
    "recipe, limit",
    [
        ("sdxl_capo_frs", None),
        ("sdxl_single", None),
        ("sdxl_pickapic_prompts", None),
        ("sd3_capo_frs", None),
        ("sd3_single", None),
        ("sdxl_10k", None),
        ("sdxl_quickstart", 1.0),
        ("lora", 1.0),
    ],
)
def test_the_recipes_of_the_paper_clip_no_gradients(conf, recipe, limit):
    cfg = compose("train", overrides=["run_dir=run", f"experiment={recipe}"])
    assert cfg.trainer.gradient_clip == limit

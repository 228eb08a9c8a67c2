"""Messages for choices of the command line: the key that made them, and what to give instead."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from capo.cli.choice_faults import unknown_choice
from capo.cli.compose import REPOSITORY, composed
from capo.cli.messages import grouped
from capo.cli.schema import check_values
from capo.errors import InputError


@pytest.mark.parametrize(("arguments", "told", "remedy"), [
    ("rewards@validation.held_out=[lookz]", "validation.held_out=lookz: no such",
     "did you mean validation.held_out=[looks]?"),
    ("rewards@evaluation.rewards=[lookz]", "rewards@evaluation.rewards=lookz: no such choice; there are alig",
     "did you mean rewards@evaluation.rewards=[looks]?"),
    ("rewards=[looks,alignmen]", "rewards=alignmen: no such", "did you mean rewards=[looks,alignment]?"),
    ("experiment=[quick,lor]", "experiment=lor: no such choice", "did you mean experiment=[quick,lora]?"),
    ("experiment=quick +experiment=lora", "experiment=quick +experiment=lora: experiment is chosen already",
     "give one list, experiment=[quick,lora]"),
    ("experiment=null", "experiment=null: it must name a file of conf/experiment/",
     "; leave it out, or give experiment=[] for none"),
    ("logger=null", "logger=null: it must name a file of conf/logger/", "; give logger=NAME"),
    ("experiment=conf/experiment/quick.yaml", "experiment=conf/experiment/quick.yaml: a file of conf/",
     "give experiment=quick, and --config-dir=FOLDER at the end for a FOLDER with your own "
     "experiment/quick.yaml"),
    ("objective=null", "objective=null: it must name a file of conf/objective/", "; give objective=NAME"),
    ("objective=zzz", "objective=zzz: no such choice; there are capo", ", smpo"),
    ("+experiment=quick", "+experiment=quick: experiment is chosen already", "give experiment=quick alone"),
    ("objective=dpo +objective=ipo", "objective is chosen already",
     "give one of them: objective=dpo or objective=ipo"),
    ("experiment=quick prompts=files prompts.train.path=a.csv",
     "there is no key 'prompts.train.path' beside experiment=quick, which sets prompts.train=16, a single",
     "leave that experiment out, or give all of it, 'prompts.train={path: a.csv}'"),
    ("experiment=lora prompts=files prompts.train.pathx=a", "there is no key 'prompts.train.pathx'",
     "did you mean prompts.train.path or prompts.train.hub?"),
])  # fmt: skip
def test_the_key_that_chose_it_and_what_to_give_are_named(arguments, told, remedy):
    with pytest.raises(InputError) as refused:
        composed("train", arguments.split(" "))
    assert str(refused.value).count(told) == 1 and str(refused.value).endswith(remedy)


@pytest.mark.parametrize("argument", [
    "rewards=nan", "rewards=[1]", "rewards=[looks,null]", "rewards=[[looks]]", "rewards=[{a:1}]",
    "trainer=1e3", "validation.held_out=3", "~objective=1", "+experiment=[true]",
])  # fmt: skip
def test_an_argument_that_names_no_file_is_told_and_no_other(argument):
    with pytest.raises(InputError) as refused:
        composed("train", grouped(["threads=1", "~pairs", argument, "seed=2"]))
    told = str(refused.value)
    assert told.startswith(f"{argument.lstrip('~+')}: it must name a file of conf/")
    assert "threads" not in told and "rewards@" not in told


def test_a_launcher_that_is_not_installed_is_told_with_what_adds_it():
    told = unknown_choice("hydra/launcher", "submitit_slurm", ["basic"], ["hydra/launcher=submitit_slurm"])
    assert told == (
        "hydra/launcher=submitit_slurm: no such choice; there are basic; pip install -e '.[submitit]' adds it"
    )


def test_what_the_messages_tell_to_give_composes():
    cfg = composed("train", ["experiment=[quick,lora]"])
    assert cfg.trainer.max_steps == 40 and cfg.model.lora
    assert composed("train", ["experiment=[]"]) == composed("train", [])
    cfg = composed("train", ["experiment=quick", "prompts=files", "prompts.train={path: a.csv}"])
    assert cfg.prompts.train == {"path": "a.csv"} and cfg.prompts.test == 16
    with pytest.raises(InputError, match="rewards=1e3: no such choice"):  # a name, in quotes
        composed("train", ['rewards="1e3"'])


def test_the_experiment_that_gives_a_refused_key_is_named(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "own.yaml"
    own.write_text(
        "# @package _global_\nrun_dir: r\ntrainer: {bacth: 4, batch: 7.5}\nobjective: {beta: null}\n"
    )
    chosen = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=[quick,own]"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        cfg = compose("train", [*chosen, "trainer.bacth=3", "+sed=1"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    with pytest.raises(InputError) as refused:
        check_values(composed("train", [*chosen, "trainer.bacth=3", "+sed=1"]))
    first, *lines = str(refused.value).splitlines()
    assert first == "these values cannot be used:"
    assert {line.strip().partition(": ")[0] for line in lines} == {
        f"{own} has objective.beta=null", "trainer.bacth=3", f"{own} has trainer.batch=7.5", "sed=1",
    }  # fmt: skip
    own.write_text("# @package _global_\nmodel: sdxl\n")
    told = r"own.yaml has \(a file of .* by `defaults: \[override /model: NAME\]`\) model=sdxl"
    with pytest.raises(InputError, match=told):
        check_values(composed("train", chosen))
    assert any("has objective.beta=null" in line and line.endswith("(model.beta)") for line in lines)


@pytest.mark.parametrize("argument", ["model=[]", "~model"])
def test_a_group_without_a_choice_is_told_before_what_refers_to_it(argument):
    with pytest.raises(InputError, match=r"^model: nothing is chosen; give model=NAME, a file of"):
        check_values(composed("train", [argument]))


def test_a_dotted_key_in_a_file_is_told_with_the_sections_to_write():
    cfg = composed("train", ["run_dir=r"])
    OmegaConf.set_struct(cfg, False)
    cfg["trainer.lr"] = 3
    with pytest.raises(InputError, match=r"trainer.lr=3: .*; in a file, .* each other: trainer: \{lr: 3\}$"):
        check_values(cfg)

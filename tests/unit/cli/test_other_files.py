"""Messages for keys that a command did not compose: the choice of a group, or the command, that has them."""

import pytest

from capo.cli.compose import composed
from capo.errors import InputError


@pytest.mark.parametrize(("script", "argument", "told"), [
    ("train", "engine.attempts=2", "there is no key 'engine.attempts' without engine=ray: give it too"),
    ("generate", "import.files=x",
     "there is no key 'import.files' without import=folder or import=pickapic or import=rankings: give one "
     "of them too, to generate.py"),
    ("train", "logger.wandb.project=x",
     "there is no key 'logger.wandb.project' without logger=wandb: give it too"),
    ("evaluate", "benchmark.set.prompts=3",
     "there is no key 'benchmark.set.prompts' without benchmark=shapes: give it too, to evaluate.py"),
    # of a file that the group's file names in its defaults list
    ("train", "prompts.train.hub=x",
     "there is no key 'prompts.train.hub' without prompts=diffusiondb or prompts=dpg or prompts=files or "
     "prompts=geneval or prompts=parti or prompts=pickapic: give one of them too"),
    # of an experiment
    ("train", "model.lora.rank=4",
     "there is no key 'model.lora.rank' without experiment=lora or experiment=sd35_medium_quickstart or "
     "experiment=sd3_quickstart or experiment=sdxl_quickstart: give one of them too"),
    ("train", "stage=import", "this command has no key 'stage'; generate.py has"),
    ("generate", "study.prompts=3", "this command has no key 'study.prompts'; python -m capo.cli.study has"),
    ("train", "policy=x",
     "this command has no key 'policy'; evaluate.py and python -m capo.cli.study have"),
    ("train", "benchmark=geneval", "this command has no key 'benchmark'; evaluate.py has"),
])  # fmt: skip
def test_what_has_a_key_is_told(script, argument, told):
    with pytest.raises(InputError) as refused:
        composed(script, [argument])
    assert str(refused.value) == told


def test_what_the_messages_tell_to_give_composes():
    assert composed("train", ["experiment=lora", "model.lora.rank=4"]).model.lora.rank == 4
    assert composed("train", ["engine=ray", "engine.attempts=2"]).engine.attempts == 2
    assert composed("generate", ["import=folder", "import.files=x"])["import"].files == "x"
    assert composed("train", ["prompts=files", "prompts.train.hub=x"]).prompts.train.hub == "x"

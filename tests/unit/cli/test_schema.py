"""The schema of the configuration: what it knows, and what a slip is told."""

import copy
import functools
import importlib
import inspect
import subprocess
import sys
from typing import get_args

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from capo.cli.schema import (
    Evaluating,
    Generating,
    Merging,
    Training,
    check_group_choices,
    check_stored,
    check_values,
)
from capo.cli.schema.evaluating import BENCHMARKS
from capo.cli.schema.groups import IMPORTS, LOGGERS, OBJECTIVES, PAIRS, PROMPTS, PromptFile
from capo.cli.schema.kinds import Draw, DType, Precision
from capo.cli.schema.rewards import Reward
from capo.cli.schema.scripts import SCRIPTS
from capo.cli.schema.trainer import BACKBONES, MMDiT
from capo.cli.values import plain
from capo.errors import InputError
from capo.runtime.run_folder import best_win_rate
from capo.runtime.schema import Node, hints, walked
from fixtures import ROOT
from fixtures.configuration import composed


@functools.cache
def defaults(name: str, *overrides: str) -> dict:
    return plain(composed(*overrides, name=name))


def changed(values: dict, override: str) -> dict:
    """The values with an override as Hydra would apply it: `key=value`, `+key=value` or `~key`."""
    key, _, text = override.partition("=")
    *above, last = key.lstrip("+~").split(".")
    values = node = copy.deepcopy(values)
    for part in above:
        node = node.setdefault(part, {})
    if key.startswith("~"):
        del node[last]
    else:
        node[last] = yaml.safe_load(text)
    return values


def told(override: str, name: str = "train", *choices: str) -> str:
    with pytest.raises(InputError) as error:
        check_values(OmegaConf.create(changed(defaults(name, *choices), override)), SCRIPTS[name])
    return str(error.value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_scripts_defaults_pass_and_every_key_of_the_schema_is_theirs(name):
    values = defaults(name)
    check_values(OmegaConf.create(values), SCRIPTS[name])
    # a key that no file sets would be one that nobody finds
    required = {key for key, field in SCRIPTS[name].model_fields.items() if field.is_required()}
    assert required == set(values)


@pytest.mark.parametrize(("override", "message"), [
    ("+new=3", "new=3: there is no such key; there are seed, threads"),
    ("+trainer.max_stepz=3", "trainer.max_stepz=3: there is no such key; did you mean trainer.max_steps?"),
    ("+max_steps=3", "max_steps=3: there is no such key; did you mean trainer.max_steps?"),
    ("+trainr.max_steps=3", "trainr.max_steps: there is no section|did you mean trainer"),
    ("+rewards.looks.lnk=log", "there is no such key; did you mean rewards.looks.link?"),
    ("+prompts.tst=3", "takes no such argument; did you mean prompts.test?"),
    ("data=null", "data=null: must be a section of keys (workers, text); leave data out, or"),
    ("sampling=3", "sampling=3: must be a section of keys (steps, guidance"),
    ("model.lora=true", "model.lora=true: must be a section of keys (rank, alpha, seed), or null"),
    ("model.lora={rank: 2, alpha: 2, seed: 0, init: 1}", "model.lora.init=1: there is no such key"),
    ("evaluation.oracle.looks.lnk=log", "no such key; did you mean evaluation.oracle.looks.link?"),
    ("evaluation.rewards.looks.link=lg", "evaluation.rewards.looks.link=lg: must be one of identity, log"),
    ("validation.held_out={own: {scorer: {_target_: a.b}, link: lg}}", "held_out.own.link=lg: must be one"),
    ("rewards={a/b: {scorer: {_target_: a.b}}}", "rewards=a/b: must be a name of at most 100 letters"),
    ("rewards={1: {scorer: {_target_: a.b}}}", "rewards=1: must be a name of at most 100 letters"),
    ("model.beta.capo=x", "model.beta.capo=x: must be a finite number above 0, or null"),
    ("~objective.beta", "objective.beta is not given: it must be a finite number above 0; give objective"),
    ("~seed", "seed is not given: it must be a whole number from 0 to 9223372036854775806; give seed=VALUE"),
    ("~noise", "noise is not given: it must be a section of keys (draw, "),
    ("~objective", "objective: nothing is chosen; give objective=NAME, a file of conf/objective/"),
    ("~rewards", "rewards: nothing is chosen; give rewards=NAME, a file of conf/rewards/"),
    ("~evaluation.rewards", "nothing is chosen; give rewards@evaluation.rewards=NAME"),
    ("rewards.looks=3", "rewards.looks=3: must be a section of keys (scorer, "),
    ("rewards.looks.scorer=3", "rewards.looks.scorer=3: must be a mapping that names what is called"),
    ("rewards.looks.range=[1]", "rewards.looks.range=[1]: must be [lowest, highest]"),
    ("+rewards.looks.requires=torch", "rewards.looks.requires=torch: must be a list of names of modules"),
    ("sampling.guidance=" + "9" * 500, "...: must be a finite number"),
    ("objective._partial_=false", "objective._partial_=false: must be true"),
    ("+objective._args_=[1]", "capo.objectives.capo takes no such argument"),
    ("trainer.lr={a: 1}", "trainer.lr={'a': 1}: must be a finite number above 0"),
    ("pool.candidates=1000000000000000000", "must be a whole number from 2 to 1000000"),
    ("evaluation.images=1000000000", "evaluation.images=1000000000: must be a whole number from 2"),
    ("seed='7'", "seed=7: must be a whole number from 0 to 9223372036854775806, and '7' is text; leave"),
    ("seed='-7'", "seed=-7: must be a whole number from 0 to 9223372036854775806"),
    ("evaluate='true'", "evaluate=true: must be true or false, and 'true' is text; leave its quotes out, or"),
    ("prompts.seed=-5", "prompts.seed=-5: must be a whole number from 0 to"),
    ("trainer.batch=1000000007", "trainer.batch=1000000007: must be a whole number from 1 to 1000000"),
    ("trainer.max_steps=" + "9" * 300, "must be a whole number from 1 to 1000000000"),
    ("planning.flops=1e-300", "planning.flops=1e-300: must be a finite number"),
    ("planning.utilization=1e-320", "must be a number from 0.0001 to 1"),
    ("rewards.looks.range=[10,1]", "rewards.looks.range=[10, 1]: must be [lowest, highest], of which"),
    ("model.beta_range={capo: [1000,300]}", "model.beta_range.capo=[1000, 300]: must be [lowest, highest]"),
    ("prompts.train=1000000000", "prompts.train=1000000000: must be a whole number from 1 to 25000"),
    ("pool.root=~nosuchuser/x", "pool.root=~nosuchuser/x: there is no user of this name, so write"),
    ("logger.csv=3", "logger.csv=3: must be a mapping that names what is called"),
    ("+logger.csv.project=3", "takes no such argument, but capo.training.loggers.wandb_logger does;"),
    ("+objective.flip=0.1", "capo.objectives.capo takes no such argument, but capo.objectives.dmpo does;"),
    ("+engine.text={devices: 1}", "engine.text={'devices': 1}: there is no such key here, but there is with "
     "engine=ray; choose that, or leave engine.text out"),
    ("noise.inversion.steps=1000000", "noise.inversion.steps=1000000: must be a whole number from 1 to 1000"),
    ("noise.inversion.renoise=101", "noise.inversion.renoise=101: must be a whole number from 0 to 100"),
    ("noise.times_per_pair=1001", "noise.times_per_pair=1001: must be a whole number from 1 to 1000"),
    ("sampling.steps=1001", "sampling.steps=1001: must be a whole number from 1 to 1000"),
    ("trainer.lr=15", "trainer.lr=15: must be a finite number above 0 and at most 1"),
    ("data.workers=100000", "data.workers=100000: must be a whole number from 0 to 4096, or null"),
    ("threads=100000", "threads=100000: must be a whole number from 1 to 4096, or null"),
    ("pool.prompts_per_shard=" + "9" * 12, "pool.prompts_per_shard=999999999999: must be a whole number"),
    ("+rewards.looks.timeout=10000000", "rewards.looks.timeout=10000000: must be a finite number above 0"),
    ("+model.lora={rank: 5000, alpha: 1}", "model.lora.rank=5000: must be a whole number from 1 to 4096"),
    ("+model.lora={rank: 4, alpha: 1e30}", "model.lora.alpha=1e30: must be a finite number above 0 and"),
])  # fmt: skip
def test_a_slip_gets_key_value_and_remedy(override, message):
    wanted, given = message.split("|"), told(override)
    assert any(part in given for part in wanted), given
    assert len(given.splitlines()) <= 2 and len(given) < 600


@pytest.mark.parametrize("value", ["nohost", "1.2.3.4:99999", "ray://head:10001", "head:0"])
def test_an_address_of_ray_is_one_of_three(value):
    given = told(f"engine.address={value}", "generate", "engine=ray")
    assert given == f"engine.address={value}: must be local, auto or HOST:PORT"


@pytest.mark.parametrize(("override", "message"), [
    ("objective=null", "objective=null: it must name a file of conf/objective/; give objective=NAME"),
    ("trainer=3", "trainer=3: it must name a file of conf/trainer/"),
    ("engine=null", "engine=null: it must name a file of conf/engine/; give engine=NAME"),
    ("noise.inversion=[1]", "noise.inversion=[1]: noise.inversion is a section of keys, not a list"),
    ("seed=" + "9" * 5000, "seed=99999999999999999999...: a number has too many digits to be read"),
])  # fmt: skip
def test_what_hydra_cannot_read_gets_a_message_too(override, message):
    with pytest.raises(InputError) as error:
        composed(override)
    assert message in str(error.value)


def test_a_reward_without_its_name_is_one_message():
    cfg = composed("rewards=looks")
    for place in ("rewards", "evaluation.rewards"):
        nameless = composed("rewards=looks")
        OmegaConf.update(nameless, place, cfg.rewards.looks, merge=False)
        with pytest.raises(
            InputError, match=rf"^{place}.scorer: a reward's name must stand above .*NAME: "
        ) as told:
            check_values(nameless)
        assert "\n" not in str(told.value)


def test_a_file_that_lacks_its_package_is_told_of_it():
    assert "first line must be `# @package _global_`" in told("+experiment.trainer.max_steps=3")
    given = told("+experiment.own=[trainer]")  # likewise a list, or a text, in place of the whole file
    assert given.startswith("experiment=") and "there is no section experiment; a file of conf/exp" in given


@pytest.mark.parametrize(("name", "override", "message"), [
    ("generate", "import.candidates=1", "import.candidates=1: must be a whole number of"),
    ("generate", "+import.limit=1", "capo.data.importing.folder takes no such argument"),
    ("generate", "import.files=3", "import.files=3: must be text"),
    ("generate", "pair_export.images=gif", "pair_export.images=gif: must be one of jpeg, png"),
    ("evaluate", "trust=x", "trust=x: must be a list of names"),
    ("merge", "method=mean", "method=mean: must be one of slerp, linear"),
    ("train", "+runs=[a,b]", "runs=['a', 'b']: there is no such key"),
])  # fmt: skip
def test_keys_of_one_script(name, override, message):
    choices = ["import=folder"] if "import" in override else []
    assert message in told(override, name, *choices)


REGISTERED = OBJECTIVES | PAIRS | PROMPTS | IMPORTS | BACKBONES | LOGGERS | BENCHMARKS
# the code gives these itself
INNER = {"errors", "scores", "calibrated", "self", "name", "unused", "parts", "args", "others", "options"}


@pytest.mark.parametrize("target", REGISTERED)
def test_the_schema_of_a_target_is_its_signature(target):
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    parameters = dict(inspect.signature(found).parameters)
    if "others" in parameters:  # what a family passes on
        parameters = dict(inspect.signature(found.__mro__[1].__init__).parameters) | parameters
    parameters = {key: value for key, value in parameters.items() if key not in INNER}
    section = REGISTERED[target]
    assert set(section.model_fields) == set(parameters)
    for key, field in section.model_fields.items():
        default = parameters[key].default
        if default is inspect.Parameter.empty:
            assert field.is_required(), key
        else:
            stated = tuple(field.default) if isinstance(field.default, list) else field.default
            assert stated == default, key


def test_the_facts_of_a_reward_and_of_a_prompt_file_are_those_of_their_classes():
    from dataclasses import MISSING, fields

    from capo.data.prompts.sources import Source
    from capo.rewards import Reward as Facts

    for section, kind, own in ((Reward, Facts, {"name", "logs"}), (PromptFile, Source, {"split"})):
        known = {field.name: field for field in fields(kind) if field.name not in own}
        assert set(section.model_fields) == set(known)
        for name, field in section.model_fields.items():
            if known[name].default is not MISSING and name != "origin":
                stated = tuple(field.default) if isinstance(field.default, list) else field.default
                assert stated == known[name].default, name


def test_the_words_of_the_schema_are_those_of_the_code():
    from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR
    from lightning.pytorch.accelerators import AcceleratorRegistry

    from capo.backbones.mmdit import LONGEST, USUAL
    from capo.backbones.precision import AUTOCAST, DTYPES
    from capo.calibration import LINKS, METHODS
    from capo.cli.generate import ALONE, FILLING
    from capo.data.dataset import ENCODE, POOL, TIMES
    from capo.data.pool.import_table import HUMAN_LABELS, REWARD_LABELS
    from capo.data.prompts.files import READERS
    from capo.noise import FLOW_DRAWS, VP_DRAWS
    from capo.objectives.averaging import REDUCTIONS
    from capo.runtime.launch import AUTO, DDP, FSDP
    from capo.runtime.optimizers import ADAMW, ADAMW_8BIT
    from capo.runtime.threads import BATCHES, OPERATIONS
    from capo.soup import METHODS as SOUPS
    from capo.training.choice import MEAN, WORST

    def stated(key: str) -> set:
        return set(get_args(kind_of(key)))

    assert set(get_args(Precision)) == set(AUTOCAST) <= set(get_args(_PRECISION_INPUT_STR))
    assert set(get_args(DType)) == set(DTYPES) and set(get_args(Draw)) == {*VP_DRAWS, *FLOW_DRAWS}
    assert stated("calibration") == set(METHODS) and stated("rewards.NAME.link") == set(LINKS)
    assert stated("stage") == {*FILLING, *ALONE} and stated("method") == set(SOUPS)
    assert stated("data.text") == {POOL, ENCODE} and stated("noise.times") == set(TIMES)
    assert stated("pool.labels") == {HUMAN_LABELS, REWARD_LABELS}
    assert stated("noise.reduction") == set(REDUCTIONS)
    assert stated("trainer.strategy") == {AUTO, DDP, FSDP}
    assert stated("trainer.optimizer") == {ADAMW, ADAMW_8BIT}
    assert stated("sampling.parallel") == {OPERATIONS, BATCHES}
    assert stated("validation.monitor") == {MEAN, WORST}
    assert stated("trainer.accelerator") - {"auto", "gpu"} <= set(
        AcceleratorRegistry.available_accelerators()
    )
    assert set(get_args(get_args(hints(PromptFile)["format"])[0])) == set(READERS)
    assert MMDiT.model_fields["sequence_length"].default == USUAL and LONGEST == 512
    sd3 = told("model.backbone.sequence_length=513", "train", "model=sd3")
    assert "sequence_length=513: must be a whole number from 0 to 512" in sd3


def kind_of(key: str) -> object:
    nodes: dict[str, Node] = {}
    for script in (Training, Evaluating, Generating, Merging):
        nodes |= dict(walked(script))
    return nodes[key].type


def test_a_slip_is_answered_without_torch():
    """Importing torch takes seconds, in which nobody wants to wait for the answer to a slip."""
    program = (
        "import sys, capo.cli.train, capo.cli.schema; "
        "assert not {'torch', 'diffusers', 'transformers', 'lightning'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    program = (
        "import sys, capo.cli.messages, capo.cli.callbacks; assert 'pydantic' not in sys.modules"  # --help
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_several_choices_of_a_group_of_which_one_counts():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["run_dir=run", "objective=[capo,dpo]", "rewards=[looks,alignment]"]
        both = compose("train", overrides=overrides, return_hydra_config=True)
        one = compose("train", overrides=["run_dir=run", "rewards=[looks]"], return_hydra_config=True)
    with pytest.raises(InputError, match=r"objective=\[capo,dpo\]: one choice .* -m objective=capo,dpo"):
        check_group_choices(both, both.hydra)
    check_group_choices(one, one.hydra)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("trainer.batch", "x", "its config.yaml has trainer.batch=x: must be a whole number"),
    ("trainer.new", 1, "its config.yaml has trainer.new=1: there is no such key"),
    ("rewards", [], r"its config.yaml has rewards=[]: must be rewards by name"),
])  # fmt: skip
def test_what_a_run_stored_goes_through_the_same_door(key, value, message):
    stored = defaults("train")
    check_stored(
        {k: v for k, v in stored.items() if k != "anchor"}, "its config.yaml"
    )  # of an earlier version
    stored = copy.deepcopy(stored)
    OmegaConf.update(cfg := OmegaConf.create(stored), key, value, merge=False, force_add=True)
    with pytest.raises(InputError) as error:
        check_stored(plain(cfg), "its config.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("[]", "it holds no names"),
    ("[" * 100_000, "outcome.json cannot be read"),
    ("{}", "val/win_rate is not given"),
    ('{"val/win_rate": "high"}', "val/win_rate=high: must be a finite number"),
    ('{"val/win_rate": 7.5}', "val/win_rate=7.5: must be a finite number from 0 to 1"),
    ('{"val/win_rate": 0.5, "card": {"objective": 3, "data": "d"}}', "card.objective=3: must be text"),
    ('{"val/win_rate": 0.5, "card": {"objective": "o", "data": "d", "new": 1}}', "card.new=1: there is no"),
])  # fmt: skip
def test_a_damaged_outcome_is_one_message(tmp_path, text, message):
    (tmp_path / "outcome.json").write_text(text)
    with pytest.raises(InputError) as error:
        best_win_rate(tmp_path)
    assert message in str(error.value) and "restore it, or remove it and train again" in str(error.value)
    (tmp_path / "outcome.json").write_text('{"val/win_rate": 0.5, "alarms": {}}')
    assert best_win_rate(tmp_path) == 0.5

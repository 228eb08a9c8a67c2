"""Messages for keys that the command line cannot set, add or remove: the key, and what to give instead."""

import pytest

from capo.cli.compose import composed
from capo.cli.schema import Training
from capo.errors import ELSEWHERE, InputError
from capo.runtime.schema.tree import every_key


@pytest.mark.parametrize(("arguments", "told"), [
    (["~prompts.train", "prompts.train.path=x"],
     "there is no key 'prompts.train.path', since ~prompts.train removes it; leave ~prompts.train out"),
    (["+objective.beta=3"],
     "+objective.beta=3: objective.beta has a value already, and + adds a key; give objective.beta=3"),
    (["~trainer.bacth"],
     "~trainer.bacth: there is no key 'trainer.bacth' to remove; did you mean ~trainer.batch?"),
    (["~zzz.yyy"], "~zzz.yyy: there is no key 'zzz.yyy' to remove; leave it out; `--cfg job` lists all keys"),
    (["++model=sdxl"], "++model=sdxl: ++ is for keys, and this is a group; give model=sdxl"),
    (["~rewards=looks"],
     "~rewards=looks: conf/rewards/looks.yaml is not chosen, so it cannot be removed; name those that are to "
     "be chosen, rewards=NAME, or remove a key, ~rewards.KEY"),
    (["~seed=7"], "~seed=7: seed is 0, and only that is removed; give ~seed"),
    (["seed@x={a: 1}"],
     "seed@x={a: 1}: @ stands between a folder of conf/ and the key that a file in it fills; give "
     "GROUP@KEY=NAME (rewards@evaluation.rewards=looks, say), or KEY=VALUE without @"),
    (["model.backbone.scheduler=X"],
     "model.backbone.scheduler has no value here that could be replaced; give +model.backbone.scheduler=X, "
     "which adds it"),
    (["rewards.looks.python=/x"],
     "rewards.looks.python has no value here that could be replaced; give +rewards.looks.python=/x, which "
     "adds it"),
    (["model.backbone.vaee=X"],
     "there is no key 'model.backbone.vaee'; did you mean model.backbone._target_ or "
     "model.backbone.weights?"),
    (["model.backbone.sequence_length=9"],
     "there is no key 'model.backbone.sequence_length' without model=sd3 or model=sd35_large or "
     "model=sd35_medium or model=shapes_mmdit: give one of them too"),
    (["experiment=quick", "model.lora.rank=4"],
     "there is no key 'model.lora.rank' without experiment=[quick,lora] or "
     "experiment=[quick,sd35_medium_quickstart] or experiment=[quick,sd3_quickstart] or "
     "experiment=[quick,sdxl_quickstart]: give one of them"),
    (["trainer.seed=1"], "there is no key 'trainer.seed'; did you mean seed or evaluation.seed?"),
    (["learning_rate=1"], "there is no key 'learning_rate'; did you mean trainer.lr or model.lr?"),
    (["trainer={bacth: 3}"], "there is no key 'trainer.bacth'; did you mean trainer.batch?"),
    (["rewards={a: 1}"],
     "there is no key 'rewards.a'; give rewards=NAME, a file of conf/rewards/, or rewards.KEY=VALUE"),
    (["pool={zzz: 1}"], "there is no key 'pool.zzz'; `--cfg job` lists all keys"),
    (["pool.zzz=1"], "there is no key 'pool.zzz'; `--cfg job` lists all keys"),
])  # fmt: skip
def test_the_key_and_what_to_give_are_told(arguments, told):
    with pytest.raises(InputError) as refused:
        composed("train", arguments)
    assert str(refused.value) == told


def test_names_of_other_programs_lead_to_keys_that_there_are():
    last = {key.rpartition(".")[2] for key in every_key(Training)}
    assert set(ELSEWHERE.values()) <= last and not ELSEWHERE.keys() & last


def test_what_the_messages_tell_to_give_composes():
    assert composed("train", ["+model.backbone.scheduler=X"]).model.backbone.scheduler == "X"
    given = ["rewards@evaluation.rewards=looks", "objective={beta: 3}", "~seed"]
    cfg = composed("train", given)
    assert cfg.objective.beta == 3 and "seed" not in cfg and "looks" in cfg.evaluation.rewards


def test_an_argument_that_a_benchmark_does_not_take_is_not_to_be_added():
    with pytest.raises(InputError, match=r"no key 'benchmark.set.path' without benchmark=dpg or"):
        composed("evaluate", ["benchmark=shapes", "benchmark.set.path=x"])

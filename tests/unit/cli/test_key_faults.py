"""Messages for keys that the command line cannot set, add or remove: the key, and what to give instead."""

import pytest

from capo.cli.compose import composed
from capo.errors import InputError


@pytest.mark.parametrize(("arguments", "told"), [
    (["~prompts.train", "prompts.train.path=x"],
     "there is no key 'prompts.train.path', since ~prompts.train removes it; leave ~prompts.train out"),
    (["+objective.beta=3"],
     "+objective.beta=3: objective.beta has a value already, and + adds a key; give objective.beta=3"),
    (["~trainer.bacth"],
     "~trainer.bacth: there is no key 'trainer.bacth' to remove; did you mean ~trainer.batch?"),
    (["~zzz.yyy"], "~zzz.yyy: there is no key 'zzz.yyy' to remove; leave it out; `--cfg job` lists all keys"),
    (["~seed=7"], "~seed=7: seed is 0, and only that is removed; give ~seed"),
    (["seed@x={a: 1}"],
     "seed@x={a: 1}: @ stands between a folder of conf/ and the key that a file in it fills; give "
     "GROUP@KEY=NAME (rewards@evaluation.rewards=looks, say), or KEY=VALUE without @"),
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


def test_what_the_messages_tell_to_give_composes():
    given = ["rewards@evaluation.rewards=looks", "objective={beta: 3}", "~seed"]
    cfg = composed("train", given)
    assert cfg.objective.beta == 3 and "seed" not in cfg and "looks" in cfg.evaluation.rewards

"""Rounds in which the policy draws anew, before any is trained: what they cost, and what is refused."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from capo.cli import rounds
from capo.cli import train as train_script
from capo.cli.build import moving_reference
from capo.cli.facts import facts_of
from capo.cli.online import check_online, check_reference
from capo.cli.plan import pool_requests, request_of
from capo.data.labels import HUMAN
from capo.errors import InputError
from capo.preflight.hours import pool_work
from capo.preflight.plan import disk_space
from capo.preflight.requests import OF_ROUNDS
from fixtures.configuration import FOUR_STEPS, composed

ROUNDS = [*FOUR_STEPS, "online.every=2"]
MODULE = SimpleNamespace(beta=300.0)


def test_the_generator_without_rounds_is_named_as_the_base():
    assert moving_reference(composed("reference=generator")) is None
    assert facts_of(composed("reference=generator"), MODULE) == facts_of(composed(), MODULE)
    in_rounds = composed("reference=generator", "online.every=100")
    assert facts_of(in_rounds, MODULE)["reference"].startswith("generator: the model that drew")


def test_the_card_tells_the_data_of_the_chosen_checkpoint_alone():
    data = SimpleNamespace(described="4 prompts", labels=[HUMAN])
    cfg = composed("online.every=80", "trainer.max_steps=240")

    def told(step: int, cfg=cfg) -> str:
        return rounds.trained_on(cfg, data, Path(f"checkpoints/{step:06d}.ckpt"))

    assert told(240, composed()) == "4 prompts"
    assert told(80).startswith("candidates of the base, ") and "policy" not in told(80)
    assert told(160).startswith("candidates of the base and, drawn anew 1 time, of the policy, ")
    assert told(240).startswith("candidates of the base and, drawn anew 2 times, of the policy, ")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["pool.imported=/nowhere"], "pool.imported: no policy draws"),
        (["selection.swap=true"], "selection.swap=true: a negative model"),
        (["trainer.reuse_reference=true"], "trainer.reuse_reference=true: no other run"),
        (["reference=generator", "trainer.ema=0.9"], "trainer.ema and reference=generator together"),
    ],
)
def test_what_rounds_do_not_go_with_is_refused(choice, message):
    check_online(composed(*choice), 4)
    with pytest.raises(InputError, match=rf"online\.every=2 does not go with {re.escape(message)}"):
        check_online(composed(*choice, "online.every=2"), 4)


@pytest.mark.parametrize("given", ["online.prompts=2", "online.keep=true"])
def test_what_belongs_to_rounds_is_not_ignored_without_them(given):
    told = f"{given.replace('true', 'True')} without online.every: there is one round alone"
    with pytest.raises(InputError, match=told):
        check_online(composed(given), 4)
    check_online(composed(given, "online.every=2"), 4)


def test_an_interval_is_not_ignored_where_the_base_stays_the_reference():
    with pytest.raises(InputError, match=r"reference.interval=5 with reference.decay=null: .*reference=ema"):
        check_reference(composed("reference.interval=5"))
    check_reference(composed())
    check_reference(composed("reference=ema", "reference.interval=5"))


def test_rounds_are_refused_before_anything_is_loaded(tiny_run, monkeypatch):
    monkeypatch.setattr("capo.cli.tune.complete_run", lambda *_: pytest.fail("training began"))
    with pytest.raises(InputError, match=r"online\.prompts=5: must be at most 4, the number of prompts"):
        train_script.run(tiny_run("refused", *ROUNDS, "online.prompts=5"))
    with pytest.raises(InputError, match=r"reference\.decay=0: must be null .* trains without a reference"):
        train_script.run(tiny_run("refused", *ROUNDS, "reference=generator", "objective=sft"))


def test_a_plan_counts_what_rounds_draw_and_keep(tiny_run):
    """Of 8 steps in rounds of 3: two refreshes of 3 prompts, and validations after steps 3, 4, 6 and 8."""
    counts = {"train": 10, "validation": 2, "test": 2}
    steps = ["trainer.max_steps=8", "online.prompts=3"]
    found = pool_requests(tiny_run("unused", *ROUNDS, *steps, "online.every=3"), counts)
    later, train = found[OF_ROUNDS], found["train"]
    assert (later.prompts, later.images, later.times, later.in_run) == (3, 4, 2, 1)
    assert later.judges == train.judges and train.prompts == 10
    assert found["policy in validation"].times == 4
    kept = pool_requests(tiny_run("unused", *ROUNDS, *steps, "online.every=3", "online.keep=true"), counts)
    assert kept[OF_ROUNDS].in_run == 2
    assert [work.units for work in pool_work(later)] == [3 * 2, 3 * 4 * 2, 3 * 4 * 2]
    without = pool_requests(tiny_run("unused", *FOUR_STEPS, *steps), counts)
    assert OF_ROUNDS not in without and without["policy in validation"].times == 2


def test_the_disk_of_rounds_is_that_of_the_run(tiny_run):
    counts = {"train": 10, "validation": 2, "test": 2}
    plain = disk_space(request_of(tiny_run("unused", *FOUR_STEPS), counts))
    found = disk_space(request_of(tiny_run("unused", *ROUNDS), counts))
    unknown = disk_space(request_of(tiny_run("unused", *ROUNDS), counts | {"train": None}))
    assert found["pools"] == plain["pools"]
    assert found["run"][OF_ROUNDS] == plain["pools"]["train"] + plain["run"]["policy"]
    assert found["run"]["total"] == plain["run"]["total"] + found["run"][OF_ROUNDS]
    assert unknown["run"][OF_ROUNDS] is None and unknown["run"]["total"] is None

"""What the summary and the model card say of the optimization."""

from types import SimpleNamespace

import pytest

from capo.cli.compose import composed
from capo.cli.facts import facts_of

MODULE = SimpleNamespace(beta=300.0)


def facts(*overrides: str) -> dict[str, str]:
    return facts_of(composed("train", ["run_dir=run", *overrides]), MODULE)


@pytest.mark.parametrize("limit, told", [("0.5", "norm at most 0.5"), ("null", "none")])
def test_the_limit_of_the_gradient_is_told(limit, told):
    assert facts(f"trainer.gradient_clip={limit}")["gradient clipping"] == told


def test_a_warm_up_that_does_not_end_is_told():
    told = facts("trainer.warm_up=500", "trainer.max_steps=2")["learning rate"]
    assert told.endswith("linear warm-up over 500 steps, of which 2 are done")
    assert "of which" not in facts()["learning rate"]


def test_an_anchor_is_told_where_there_is_one():
    assert "anchor" not in facts()
    assert facts("anchor.weight=2", "anchor.slack=0.5")["anchor"] == "2 relu(beta w (m+ - r+) - 0.5)"


def test_times_are_told():
    assert facts()["times"] == "logsnr_normal_late, independent"
    several = ["noise.times=stratified", "noise.times_per_pair=4", "noise.reduction=inside"]
    assert facts(*several)["times"] == "logsnr_normal_late, stratified, 4 per pair, loss of their mean margin"


def test_a_reference_that_follows_is_told_where_there_is_one():
    assert "reference" not in facts()
    assert (
        facts("reference=ema")["reference"] == "moving average of the policy, decay 0.99, updated each step"
    )
    later = facts("reference=ema", "reference.decay=0", "reference.interval=50")
    assert later["reference"] == "moving average of the policy, decay 0, updated every 50 steps"

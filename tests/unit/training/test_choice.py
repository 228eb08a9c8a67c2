"""Which policy is kept, from scripted win-rates on validation prompts."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from capo.training.choice import MEAN, WORST, Choice, monitored, monitored_interval

PROMPTS = 40


def rates(**means):
    """Win-rates (P,) of each reward around its mean, with the same spread over prompts for every policy."""
    spread = torch.linspace(-0.2, 0.2, PROMPTS, dtype=torch.float64)
    return {name: spread + mean for name, mean in means.items()}


def noisy(mean, seed):
    """Win-rates of one reward with exactly this mean, but an order of prompts of its own."""
    order = torch.randperm(PROMPTS, generator=torch.Generator().manual_seed(seed))
    return {"a": rates(a=mean)["a"][order]}


def test_the_mean_and_the_worst_reward():
    assert monitored(torch.tensor([0.4, 0.8]), MEAN).item() == pytest.approx(0.6)
    assert monitored(torch.tensor([0.4, 0.8]), WORST).item() == pytest.approx(0.4)


def test_the_interval_is_scipys():
    values = noisy(0.6, 1)["a"]
    expected = bootstrap(
        (values.numpy(),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    found = monitored_interval(values[None], MEAN, 0)
    assert found == pytest.approx((expected.low, expected.high), abs=2e-3)
    assert found == monitored_interval(values[None], MEAN, 0) != monitored_interval(values[None], MEAN, 1)


def test_what_two_policies_share_does_not_widen_their_difference():
    one, other = (torch.stack(list(rates(a=mean).values())) for mean in (0.61, 0.6))
    assert monitored_interval(one, MEAN, 0, other) == pytest.approx((0.01, 0.01))


def test_the_highest_is_kept_whatever_comes_after():
    choice = Choice()
    offered = [("step 1", 0.55), ("step 2", 0.70), ("step 3", 0.40)]
    assert [choice.offer(name, rates(a=mean)) for name, mean in offered] == [True, True, False]
    assert choice.best.name == "step 2" and choice.best.rate.mean == pytest.approx(0.7)
    assert choice.warnings() == []


def test_the_earlier_one_is_kept_where_two_do_not_differ():
    choice = Choice()
    assert choice.offer("step 1", noisy(0.70, 1)) and not choice.offer("step 2", noisy(0.71, 2))
    assert choice.best.name == "step 1"
    assert [line for line in choice.sentences() if line.startswith("step 2 is higher, but not beyond chance")]


def test_by_the_worst_reward_another_policy_is_kept():
    for monitor, kept in {MEAN: "step 2", WORST: "step 1"}.items():
        choice = Choice(monitor)
        choice.offer("step 1", rates(a=0.60, b=0.60))
        choice.offer("step 2", rates(a=0.90, b=0.40))
        assert choice.best.name == kept


def test_a_policy_below_the_base_is_told():
    """The highest of several that are all below 0.5 is kept, with a warning; one above it then wins."""
    choice = Choice()
    assert choice.offer("step 1", rates(a=0.30)) and choice.offer("step 2", rates(a=0.40))
    assert not choice.offer("step 3", rates(a=0.35))
    [warning] = choice.warnings()
    assert warning.startswith("step 2 has a win-rate of 0.400") and "not above the base's 0.5" in warning
    assert choice.offer("step 4", rates(a=0.58)) and choice.warnings() == []


def test_one_beyond_chance_above_the_base_replaces_one_that_is_not():
    """Also where the two do not differ beyond chance: the base takes part with 0.5."""
    choice = Choice()
    choice.offer("step 1", {"a": 0.505 + 0.5 * torch.linspace(-1, 1, PROMPTS, dtype=torch.float64)})
    assert not choice.best.above_base
    assert choice.offer("step 2", rates(a=0.56)) and choice.best.above_base


def test_a_resumed_choice_goes_on_as_before():
    first = Choice(WORST, 3)
    first.offer("step 1", noisy(0.70, 1))
    first.offer("step 2", noisy(0.71, 2))
    second = Choice(WORST, 3)
    second.restore(first.state())
    assert second.sentences() == first.sentences() and second.passed
    assert second.offer("step 3", noisy(0.9, 3)) is first.offer("step 3", noisy(0.9, 3)) is True


def test_nothing_is_chosen_from_nothing():
    with pytest.raises(ValueError, match="nothing was offered"):
        Choice().sentences()
